"""The loaders that are compared: ours and the peers, each behind the functions of `tests.bench.data.task.Loader`."""
