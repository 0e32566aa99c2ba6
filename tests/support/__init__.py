"""Helpers shared by tests: data, small models, small runs."""
