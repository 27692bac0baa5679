"""Speed and memory, each a command that prints one table: python -m benchmarks.train ..."""
