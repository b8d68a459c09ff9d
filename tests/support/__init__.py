"""What tests are made of: a database, an application, a client, what is observed."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder of the project."""
