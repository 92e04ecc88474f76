"""What is measured. Each workload runs a peer once and returns its numbers by metric."""
