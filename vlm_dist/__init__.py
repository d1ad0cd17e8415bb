"""vlm-dist: DeepSpeed multi-node LoRA fine-tuning of vision-language models.

This module imports nothing, so that `import vlm_dist.config` stays fast on a login node.
"""

__version__ = "0.1.0"
