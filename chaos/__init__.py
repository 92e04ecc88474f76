"""Programs that break the listener on purpose, and judge from a record what it did then."""
