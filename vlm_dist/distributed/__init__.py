"""Ranks, process groups, and how ranks agree. Torch-free at import, so that the launcher can use `environment`."""
