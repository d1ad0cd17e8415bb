"""`vlm-dist doctor`: what is installed."""

from __future__ import annotations

import argparse

from vlm_dist.cli.arguments import Commands


def add_commands(commands: Commands) -> None:
    """Add `doctor`."""
    doctor = commands.add_parser("doctor", help="versions, devices, and which `deepspeed` command is installed")
    doctor.set_defaults(command=show_installation)


def show_installation(options: argparse.Namespace) -> None:
    """Print versions and devices; say so if `deepspeed` is the stock command."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from launcher.entry_point_check import stock_deepspeed_notice

    print(f"python {platform.python_version()}")
    for package in (
        "vlm-dist",
        "torch",
        "transformers",
        "peft",
        "deepspeed",
        "datasets",
        "webdataset",
        "decord",
        "wandb",
    ):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed; fix: pip install -e .")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(names) if names else 'CPU only'}")
    print(stock_deepspeed_notice() or "deepspeed command: ours, -m works")
