"""Engines, pooled connections, and what each database does."""
