"""`vlm-dist`: what one wants to know and to do before and after training."""

from vlm_dist.cli.main import main

__all__ = ["main"]
