"""Training recipe of the small model: the phases before the three stages of ``yivl.train``, and its report."""
