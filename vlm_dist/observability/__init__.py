"""Figures of a run and where they go: console, `metrics.jsonl`, wandb, TensorBoard. Imports no torch."""
