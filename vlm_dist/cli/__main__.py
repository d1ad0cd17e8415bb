"""`python -m vlm_dist.cli`."""

import sys

from vlm_dist.cli.main import main

sys.exit(main())
