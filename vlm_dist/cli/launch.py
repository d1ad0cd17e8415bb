"""`vlm-dist launch`: check a run, then start it here, on hosts over ssh, or under Slurm."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.cli.arguments import Commands, add_run
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from launcher.plan import LaunchPlan, Request

_EPILOG = """\
Without --local, --hostfile and --slurm: inside an allocation of Slurm the run is a step of it (srun), else it is on
this machine. Examples:
  vlm-dist launch configs/run.yaml                                   all GPUs of this machine
  vlm-dist launch configs/run.yaml --gpus-per-node 8 --max-restarts 3
  vlm-dist launch configs/run.yaml --hostfile hosts                  lines: gpu01 slots=8
  vlm-dist launch configs/run.yaml --slurm --nodes 4 --account vision --time 12:00:00
  vlm-dist launch configs/run.yaml --slurm --dry-run                 what would be run, as lines for a shell
  vlm-dist launch configs/run.yaml --render run.sbatch --nodes 4     a batch script of this run
Exit codes are those of the run (docs/faults.md); signals reach its ranks.
"""


#: Options that are variables of the batch script, too.
_SCRIPT_VARIABLES = ("modules", "container", "pyxis_image", "container_mounts")


def add_commands(commands: Commands) -> None:
    """Add `launch`."""
    launch = commands.add_parser(
        "launch",
        help="check a run, then start it here, on hosts over ssh, or under Slurm",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(launch)
    where = launch.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="on this machine, also inside an allocation")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="on these hosts, over ssh (lines: gpu01 slots=8)")
    where.add_argument("--slurm", action="store_true", help="submit a job: sbatch with slurm/train.sbatch")
    launch.add_argument("--nodes", type=_positive, metavar="N", help="nodes (all that there are; the batch script's)")
    launch.add_argument(
        "--gpus-per-node", "--num-gpus", "--num_gpus", type=_positive, metavar="N", help="processes of each node"
    )
    launch.add_argument(
        "--max-restarts", type=_not_negative, metavar="N", help="start again after a fault; on this machine"
    )
    launch.add_argument("--master-addr", metavar="HOST", help="where the ranks meet, if the first address is wrong")
    launch.add_argument("--master-port", type=_positive, metavar="PORT", help="where the ranks meet (a free one)")
    slurm = launch.add_argument_group("with --slurm and --render")
    for name in ("account", "partition", "time", "qos", "job-name"):
        slurm.add_argument(
            f"--{name}", metavar=name.upper(), help=argparse.SUPPRESS if name == "job-name" else "of sbatch"
        )
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other, such as --sbatch=--constraint=a100"
    )
    slurm.add_argument("--modules", metavar='"A B"', help="environment modules that the job loads")
    slurm.add_argument("--container", metavar="IMAGE", help="image of apptainer that the ranks run in")
    slurm.add_argument("--pyxis-image", metavar="IMAGE", help="the same for srun's pyxis plugin")
    slurm.add_argument("--container-mounts", metavar="LIST", help="for either: /data,/from:/to:ro")
    slurm.add_argument("--template", type=Path, metavar="FILE", help="batch script to fill in (slurm/train.sbatch)")
    what = launch.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print commands and environment, start nothing")
    what.add_argument("--render", type=Path, metavar="FILE", help="write the batch script (-: to the screen)")
    what.add_argument("--doctor", action="store_true", help="examine the nodes with `vlm-dist doctor`; no training")
    launch.set_defaults(command=launch_run)


def launch_run(options: argparse.Namespace) -> int:
    """Check, then start and wait; gives back the exit code of the run."""
    from launcher.plan import make_plan, render
    from launcher.preflight import check_run

    request = _request(options)
    local = request.target == "local" and options.render is None
    if not request.doctor:  # which tells itself what is wrong with the run, beside all else
        for notice in check_run(request.run, request.overrides, same_machine=local)[1]:
            print(f"notice: {notice}", file=sys.stderr)
    if options.render is not None:
        _write_script(render(request), options.render)
        return 0
    plan = make_plan(request, os.environ)
    if options.dry_run:
        print(plan.as_shell(), end="")
        return 0
    return _start(plan)


def _start(plan: LaunchPlan) -> int:
    from launcher.foreground import run_in_foreground
    from launcher.hosts import check_reachable
    from launcher.plan import EXPORT_FILE

    for notice in plan.notices:
        print(f"notice: {notice}", file=sys.stderr)
    print(f"launch: {plan.title}", file=sys.stderr, flush=True)
    check_reachable(plan.hosts)
    environment = {name: value for name, value in os.environ.items() if name not in plan.unset}
    environment |= plan.environment
    if plan.export_file is None:
        return run_in_foreground(plan.command, environment, plan.standard_input, plan.translated)
    with tempfile.NamedTemporaryFile("w", prefix="vlm-dist-exports-") as exports:
        exports.write(plan.export_file)
        exports.flush()
        environment[EXPORT_FILE] = exports.name
        return run_in_foreground(plan.command, environment, plan.standard_input, plan.translated)


def _request(options: argparse.Namespace) -> Request:
    from launcher.plan import Request

    target = "local"
    if options.hostfile is not None:
        target = "hostfile"
    elif options.slurm or options.render is not None:
        target = "slurm"
    elif not options.local and os.environ.get("SLURM_JOB_ID") and options.max_restarts is None:
        target = "allocation"
    sbatch = {
        name: getattr(options, name.replace("-", "_"))
        for name in ("account", "partition", "time", "qos", "job-name")
        if getattr(options, name.replace("-", "_")) is not None
    }
    for option in options.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        if not name or name.startswith("-") or " " in name:
            raise ConfigError(f"--sbatch {option}: expected a form like --sbatch=--constraint=a100")
        sbatch[name] = value
    variables = {
        name.upper(): getattr(options, name) for name in _SCRIPT_VARIABLES if getattr(options, name) is not None
    }
    if variables and target != "slurm":
        name = next(iter(variables)).lower().replace("_", "-")
        raise ConfigError(f"--{name} is of slurm/train.sbatch: it needs --slurm or --render")
    if sbatch and target != "slurm":
        raise ConfigError(f"--{next(iter(sbatch))} is an option of sbatch: it needs --slurm or --render")
    return Request(
        run=options.run,
        overrides=tuple(options.overrides),
        target=target,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        hostfile=options.hostfile,
        max_restarts=options.max_restarts,
        master_addr=options.master_addr,
        master_port=options.master_port,
        sbatch=sbatch,
        template=options.template,
        variables=variables,
        doctor=options.doctor,
    )


def _write_script(script: str, path: Path) -> None:
    if str(path) == "-":
        print(script, end="")
        return
    try:
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--render {path}: cannot be written: {error.strerror}") from None
    print(f"written: {path}; submit it with: sbatch {path}", file=sys.stderr)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)
