"""Pipelines to copy from: each with its tables, and run by `make demo PIPELINE=name`."""
