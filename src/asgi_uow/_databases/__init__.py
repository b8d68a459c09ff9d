"""Engines, pooled connections, and what is known of each database."""
