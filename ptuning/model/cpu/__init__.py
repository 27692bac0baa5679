"""What makes the model fast on a CPU: matrix products, attention over ragged batches, threads."""
