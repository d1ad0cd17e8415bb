"""Makes, indexes, checks and shows tar shards: what `vlm-dist shards` does."""
