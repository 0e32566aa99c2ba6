"""Export to other programs, import from them, and the model card."""
