"""The embedded small model: the synthetic world it is trained on, and its training recipe."""
