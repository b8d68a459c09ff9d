"""What a handler holds: SQLAlchemy's session, one call at a time."""
