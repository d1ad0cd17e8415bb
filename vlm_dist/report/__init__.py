"""A run directory as a page: curves, events, configuration, environment; several runs over each other."""
