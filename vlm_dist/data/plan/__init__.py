"""The plan: which samples every step sees, and in which micro-batches."""
