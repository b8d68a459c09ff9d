"""What a unit of work costs.

`python -m benchmarks`: everything; with `--report docs` it writes the page of numbers.
`python -m benchmarks.instructions`: in instructions alone, for steps too small to time.
`python -m benchmarks.profile`: which functions make the difference.
`python -m benchmarks.growth`: what one more hook, savepoint, database or block costs.
`python -m benchmarks.throughput`: uvicorn under load, beside other libraries.
`python -m benchmarks.slow_clients`: what clients that read slowly hold.
`python -m benchmarks.truth`: what the client gets and the database holds in a fault.
Each takes `--only` with the beginnings of questions' names.
"""

from __future__ import annotations
