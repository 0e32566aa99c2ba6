"""Training data: rows, mixtures, batches."""
