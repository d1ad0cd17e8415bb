"""Tiny random checkpoints of every model family: real classes, real checkpoint format, no download.

Each is made once per test process, saved to a directory and loaded by the product's own path.
"""

from tests.unit.families.zoo.checkpoints import CHECKPOINTS, TinyCheckpoint

__all__ = ["CHECKPOINTS", "TinyCheckpoint"]
