"""Which rows are too close to evaluation sets, or to each other."""
