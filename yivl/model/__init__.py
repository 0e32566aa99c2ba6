"""The architecture: ViT, projector, fusion and decoder."""
