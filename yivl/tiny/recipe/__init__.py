"""How a small model is made from nothing, before the three stages of ``yivl.train``."""
