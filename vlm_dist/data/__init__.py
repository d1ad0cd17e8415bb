"""From shards to micro-batches: index, plan, materialise."""
