"""A script per trainer: reads a `Job`, configures the trainer as its own documents do, trains, and writes its steps."""
