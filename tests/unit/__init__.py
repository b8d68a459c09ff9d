"""The unit of work: its states, its end, its hooks."""
