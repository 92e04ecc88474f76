"""The demo, and stand-ins with which the listener runs on a bare machine: database, stage API."""
