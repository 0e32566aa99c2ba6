"""A synthetic world: scenes, their images and segmentations, and texts about them in English and Chinese."""
