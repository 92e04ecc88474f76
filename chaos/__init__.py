"""Programs that break the listener on purpose, record what happens and judge the record."""
