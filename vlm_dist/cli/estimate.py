"""`vlm-dist estimate`: memory and time of a run, before it is started."""

from __future__ import annotations

import argparse

from vlm_dist.cli.arguments import Commands, add_run


def add_commands(commands: Commands) -> None:
    """Add `estimate`."""
    parser = commands.add_parser(
        "estimate",
        help="memory, time and the ZeRO stage of a run, before it is started",
        description="Work out the memory of each GPU by part, whether the run fits, the largest batch that does, and "
        "the seconds of a step, from the model's config.json alone: no GPU and no weights are needed.",
    )
    add_run(parser)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each node (%(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument("--gpu", default="H100", help="which GPU: H100, A100, L40S, RTX 4090 … (%(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=None, metavar="GIB", help="of one GPU (as --gpu has)")
    parser.add_argument(
        "--interconnect",
        default=None,
        metavar="LINK",
        help="slowest link between GPUs: nvlink, pcie, infiniband, ethernet, or GB/s (nvlink; of nodes infiniband)",
    )
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the GPU's peak reached (%(default)s)")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.set_defaults(command=show_estimate)


def show_estimate(options: argparse.Namespace) -> None:
    """Print the estimate and what it recommends."""
    import json

    from vlm_dist.cli.messages import show_messages
    from vlm_dist.config import load_run
    from vlm_dist.estimate.advice import advise
    from vlm_dist.estimate.estimate import estimate, machine_of
    from vlm_dist.estimate.show import as_json, show

    show_messages()
    machine = machine_of(
        options.gpus, options.nodes, options.gpu_memory, options.gpu, options.interconnect, options.efficiency
    )
    made = estimate(load_run(options.run, options.overrides), machine)
    advice = advise(made)
    if options.json:
        print(json.dumps(as_json(made, advice), indent=2))
    else:
        show(made, advice)
