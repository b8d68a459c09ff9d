"""What the benchmarks write is what they have measured."""
