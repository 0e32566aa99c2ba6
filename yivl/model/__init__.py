"""The model: ViT, projector, fusion, decoder; and how checkpoints are read and written."""
