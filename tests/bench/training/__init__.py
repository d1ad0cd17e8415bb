"""Whole training runs on a CPU, ours beside those of the peers, on the same samples and the same model."""
