"""Stand-ins that make the listener run on a bare machine: a database and a stage API."""
