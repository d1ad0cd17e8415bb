"""Which `deepspeed` command does this environment have?

Two packages install a script of that name: DeepSpeed (the stock runner) and this project (the same runner, which also
takes `-m`). The one that was installed last is there, so that a later reinstall of DeepSpeed brings the stock one back.
"""

from __future__ import annotations

import sys
from pathlib import Path

OUR_MODULE = "launcher.deepspeed_cli"


def stock_deepspeed_notice(script_directory: Path | None = None) -> str | None:
    """One line for the user where the `deepspeed` command is not ours; None where there is nothing to say.

    Args:
        script_directory: where the environment has its commands; that of the running Python when None.
    """
    script = (script_directory or Path(sys.executable).parent) / "deepspeed"
    try:
        is_ours = OUR_MODULE in script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None  # no such command here: nothing to confuse
    if is_ours:
        return None
    return (
        f"{script} is DeepSpeed's own command, which does not know -m: write --module instead "
        "(deepspeed --num_gpus 2 --module vlm_dist.train ...), or install vlm-dist again without its dependencies "
        "(pip install --force-reinstall --no-deps, or uv pip install --reinstall --no-deps)"
    )
