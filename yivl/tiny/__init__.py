"""The small model that the package contains: its world of drawn images and its training recipe."""
