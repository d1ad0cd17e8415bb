"""Stateless worker processes that make micro-batches."""
