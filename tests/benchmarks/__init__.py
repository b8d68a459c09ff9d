"""What the benchmarks see."""
