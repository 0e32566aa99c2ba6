"""How the small model that is shipped with the package is made, before the three stages of ``yivl.train``."""
