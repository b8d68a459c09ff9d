"""What a handler holds: the write session and the read session."""
