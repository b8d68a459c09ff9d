"""Which server may answer a read."""
