"""Scripts that measure, with their results as JSON beside them."""
