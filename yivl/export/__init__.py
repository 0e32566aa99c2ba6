"""Models and data in the forms of other tools."""
