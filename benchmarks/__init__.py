"""What a unit of work costs: `python -m benchmarks`."""

from __future__ import annotations
