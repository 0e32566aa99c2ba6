"""Evaluation of the answers of a model."""
