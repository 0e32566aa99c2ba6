"""Training: stages, fine-tuning, checkpoints, merging."""
