"""Our adapter for a public benchmark of PostgreSQL queues, and how to run that here."""
