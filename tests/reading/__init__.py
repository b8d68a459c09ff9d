"""Which server answers a read."""
