"""`vlm-dist doctor`: this machine, or all nodes of a run, as one table with what is wrong on top."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.messages import counted
from vlm_dist.errors import ConfigError, DistributedError, ExitCode
from vlm_dist.observability.findings import Finding, Level, format_table

if TYPE_CHECKING:
    from vlm_dist.cli.doctor_checks import Examined
    from vlm_dist.cli.doctor_facts import NodeFacts
    from vlm_dist.config import RunConfig
    from vlm_dist.distributed.environment import Topology

#: How long the nodes wait for each other; a node that does not come is told, not waited for.
MEETING_SECONDS = 60

_EPILOG = """\
On several nodes: vlm-dist launch RUN.yaml --doctor, with --hostfile, --slurm or inside an allocation; or
srun python -m vlm_dist.cli doctor --run RUN.yaml. It ends with 1 where there is a problem, with 0 where there is none.
"""


def add_commands(commands: Commands) -> None:
    """Add `doctor`."""
    doctor = commands.add_parser(
        "doctor",
        help="examine this machine, or all nodes of a run: versions, GPUs, links, disks, limits, data",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "--run", type=Path, metavar="RUN.yaml", help="also what this run needs: data, space, ZeRO stage"
    )
    doctor.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    doctor.set_defaults(command=examine)


def examine(options: argparse.Namespace) -> int:
    """Examine, on all ranks; the first one prints. Gives back the exit code."""
    from vlm_dist.cli.doctor_checks import Examined, check_all
    from vlm_dist.distributed.environment import resolve_topology
    from vlm_dist.distributed.process_settings import settle

    topology = resolve_topology(os.environ)
    told = settle(os.environ, topology)
    config, wrong = _load(options)
    findings = [Finding(Level.PROBLEM, "run file", line, "mend it") for line in wrong]
    from vlm_dist.cli.doctor_facts import gather_facts  # torch: after the variables that it reads

    own = gather_facts(config, "; ".join(told)) if topology.local_rank == 0 else None
    try:
        examined = _together(topology, own, config) if topology.world_size > 1 else None
    except DistributedError as error:
        if own is None:
            return int(error.exit_code)
        fix = "the network between the nodes: interfaces and firewall (docs/launching.md)"
        findings.append(Finding(Level.PROBLEM, "meeting", str(error), fix))
        examined = Examined([own], config=config)
        print(f"{own.host} alone:")
    else:
        if topology.rank != 0:
            return int(ExitCode.DONE)
    if examined is None:
        assert own is not None
        examined = Examined([own], config=config, ranks_per_node={own.host: 1})
    findings = sorted([*findings, *check_all(examined)], key=lambda finding: finding.level)
    num_nodes, num_ranks = len(examined.nodes), examined.num_ranks
    title = f"{counted(num_nodes, 'node')}, {num_ranks} process{'es' if num_ranks > 1 else ''}"
    print(format_table(findings, f"vlm-dist doctor: {title}"))
    has_problem = any(finding.level is Level.PROBLEM for finding in findings)
    return int(ExitCode.FAILURE if has_problem else ExitCode.DONE)


def _load(options: argparse.Namespace) -> tuple[RunConfig | None, list[str]]:
    """The run's configuration, or what is wrong with it."""
    if options.run is None:
        if options.overrides:
            raise ConfigError("--set changes a run: name it with --run RUN.yaml")
        return None, []
    from vlm_dist.config import load_run

    try:
        return load_run(options.run, options.overrides), []
    except ConfigError as error:
        return None, str(error).splitlines()


def _together(topology: Topology, own: NodeFacts | None, config: RunConfig | None) -> Examined:
    """Gather the facts of all nodes and measure between them. Collective: every rank calls this."""
    import socket
    from datetime import timedelta

    from vlm_dist.cli.doctor_checks import Examined
    from vlm_dist.cli.doctor_facts import existing_parent
    from vlm_dist.cli.doctor_links import measure_links
    from vlm_dist.cli.doctor_zero import model_size
    from vlm_dist.distributed.group import init_process_groups, is_lost_peer, shut_down

    try:
        ranks = init_process_groups(topology, timedelta(seconds=MEETING_SECONDS))
        hosts = ranks.gather_objects(socket.gethostname())
        nodes = [facts for facts in ranks.gather_objects(own) if facts is not None]
        shared = existing_parent(config.train.output_dir if config is not None else Path())
        links = measure_links(ranks, hosts, shared)
        ranks.barrier()
        shut_down()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise DistributedError(
            f"rank {topology.rank} has lost the others while links were measured: {error}"
        ) from error
    size = None
    if ranks.is_main and config is not None and Path(config.model_id).is_dir():
        size = model_size(Path(config.model_id), config.peft.r)
    return Examined(nodes, topology.world_size, links, config, size, {host: hosts.count(host) for host in hosts})
