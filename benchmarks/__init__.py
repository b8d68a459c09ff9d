"""What a unit of work costs.

`python -m benchmarks`: every question in time and in instructions.
`python -m benchmarks.instructions`: in instructions alone, for steps too small to time.
`python -m benchmarks.throughput`: uvicorn under load, beside other libraries.
Each takes `--only` with the beginnings of questions' names.
"""

from __future__ import annotations
