"""Training data: rows, samples, batches."""
