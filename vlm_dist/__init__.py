"""vlm-dist: DeepSpeed multi-node LoRA fine-tuning of vision-language models.

This module imports nothing heavy, so that `import vlm_dist.config` stays fast on a login node.
"""

import logging

# PEFT imports it where it is installed; without a GPU it then recommends a package that nothing here would use
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
