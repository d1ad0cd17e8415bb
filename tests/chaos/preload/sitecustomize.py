"""Read by every Python process of a campaign at its start: this directory is on PYTHONPATH. Idle without CHAOS."""

import os

if os.environ.get("CHAOS"):
    from tests.chaos import inject

    inject.install()
