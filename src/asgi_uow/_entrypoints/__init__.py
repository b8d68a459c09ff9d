"""Where a unit of work begins."""
