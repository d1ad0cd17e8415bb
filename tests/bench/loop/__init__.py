"""What our loop costs beside a bare one over the same micro-batches, on the same engine."""
