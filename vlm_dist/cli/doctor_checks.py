"""What is wrong with the nodes of a run, and how to mend it: one function per check, over the facts of all nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm_dist.cli.doctor_facts import NodeFacts
from vlm_dist.cli.doctor_links import Links
from vlm_dist.cli.doctor_zero import ModelSize, advise, zero_cost
from vlm_dist.cli.messages import counted
from vlm_dist.observability.findings import Finding, Level

if TYPE_CHECKING:
    from vlm_dist.config import RunConfig

GB, MB = 1e9, 1e6
#: Below these something is said.
MIN_SHM_BYTES, MIN_FREE_BYTES, MIN_OPEN_FILES, MIN_READ_RATE = 1 * GB, 5 * GB, 4096, 100 * MB
#: A run cannot go on below this.
NO_SPACE_BYTES = 0.5 * GB
_SHM = "/dev/shm"  # noqa: S108  # a name in the table
#: Clocks: of log lines, wandb and files on shared disks. No decision of a run depends on them.
MAX_CLOCK_SECONDS = 1.0
#: A link that is slower than the others by so much is told.
SLOW_LINK = 0.5


@dataclass(frozen=True)
class Examined:
    """All that checks look at.

    Attributes:
        nodes: facts of every node.
        num_ranks: over all of them.
        links: None: there is one process.
        config: of the run; None: no run was named, or it is wrong.
        model: its size, where it lies in a local directory.
        ranks_per_node: node -> number of ranks.
    """

    nodes: Sequence[NodeFacts]
    num_ranks: int = 1
    links: Links | None = None
    config: RunConfig | None = None
    model: ModelSize | None = None
    ranks_per_node: Mapping[str, int] = field(default_factory=dict)


def check_all(examined: Examined) -> list[Finding]:
    """All findings, problems first."""
    findings = [finding for check in CHECKS for finding in check(examined)]
    return sorted(findings, key=lambda finding: finding.level)


def _grouped(values: Iterable[tuple[str, str]]) -> str:
    """`2.1 on a, b; 2.2 on c`, or the one value that all have."""
    groups: dict[str, list[str]] = {}
    for host, value in values:
        groups.setdefault(value, []).append(host)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{value} on {_hosts(hosts)}" for value, hosts in groups.items())


def _hosts(hosts: Sequence[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 4 else f"{', '.join(hosts[:3])} and {len(hosts) - 3} more"


def _versions(examined: Examined) -> Iterator[Finding]:
    nodes = examined.nodes
    for package in nodes[0].versions:
        values = [(node.host, node.versions.get(package) or "not installed") for node in nodes]
        found = _grouped(values)
        if len({value for _, value in values}) > 1:
            yield Finding(
                Level.PROBLEM,
                package,
                found,
                "install the same version on all nodes (pip install -c constraints.txt -e .)",
            )
        elif found == "not installed":
            yield Finding(Level.PROBLEM, package, found, "pip install -e .")
        else:
            yield Finding(Level.OK, package, found)
    stock = [node for node in nodes if node.stock_deepspeed]
    if stock:
        yield Finding(Level.WARNING, "deepspeed command", "DeepSpeed's own, without -m", stock[0].stock_deepspeed)
    else:
        yield Finding(Level.OK, "deepspeed command", "ours, -m works")


def _gpus(examined: Examined) -> Iterator[Finding]:
    nodes = examined.nodes

    def describe(node: NodeFacts) -> str:
        kinds = dict.fromkeys(f"{name}, {memory / 2**30:.0f} GiB" for name, memory in node.gpus)
        return f"{len(node.gpus)} x {' / '.join(kinds)}" if node.gpus else "CPU only"

    values = [(node.host, describe(node)) for node in nodes]
    if len({value for _, value in values}) > 1:
        fix = "ask for nodes of one kind (sbatch --constraint), or leave the odd one out"
        yield Finding(Level.PROBLEM, "GPUs", _grouped(values), fix)
    elif not nodes[0].gpus and nodes[0].driver:
        built = f"torch is built for CUDA {nodes[0].cuda}" if nodes[0].cuda else "torch is built without CUDA"
        fix = "a torch for this driver (nvidia-smi shows the newest CUDA it takes), and CUDA_VISIBLE_DEVICES not empty"
        yield Finding(Level.PROBLEM, "GPUs", f"driver {nodes[0].driver}, but none is usable: {built}", fix)
    else:
        yield Finding(Level.OK, "GPUs", values[0][1])
    drivers = [(node.host, node.driver or "none") for node in nodes]
    if len({value for _, value in drivers}) > 1:
        yield Finding(Level.WARNING, "GPU driver", _grouped(drivers), "the same driver on all nodes; NCCL may fail")
    elif nodes[0].gpus:
        yield Finding(Level.OK, "GPU driver", f"{drivers[0][1]}, CUDA {nodes[0].cuda}, NCCL {nodes[0].nccl}")
    for node in nodes:
        ranks = examined.ranks_per_node.get(node.host, 1)
        if node.gpus and ranks > len(node.gpus):
            fix = f"start {len(node.gpus)} there (--gpus-per-node)"
            yield Finding(Level.PROBLEM, "ranks", f"{ranks} on {node.host}, which has {len(node.gpus)} GPUs", fix)


def _limits(examined: Examined) -> Iterator[Finding]:
    nodes = examined.nodes
    small = [(n.host, f"{(n.shm_bytes or 0) / MB:,.0f} MB") for n in nodes if (n.shm_bytes or 0) < MIN_SHM_BYTES]
    if small:
        fix = "docker --shm-size=16g, Kubernetes: an emptyDir of medium Memory (slurm/kubernetes.yaml)"
        yield Finding(Level.WARNING, _SHM, _grouped(small), fix)
    else:
        yield Finding(Level.OK, _SHM, f"at least {min(n.shm_bytes or 0 for n in nodes) / GB:.1f} GB")
    few = [(n.host, str(n.open_files)) for n in nodes if 0 <= n.open_files < MIN_OPEN_FILES]
    if few:
        yield Finding(
            Level.WARNING, "open files", _grouped(few), "ulimit -n 65536 before the start; many shards are open"
        )
    else:
        limits = [node.open_files for node in nodes if node.open_files >= 0]
        yield Finding(Level.OK, "open files", f"at least {min(limits):,}" if limits else "not limited")
    locked = [n.host for n in nodes if n.has_infiniband and n.locked_bytes >= 0]
    if locked:
        fix = "ulimit -l unlimited (for Slurm: LimitMEMLOCK=infinity of slurmd), or NCCL cannot use InfiniBand"
        yield Finding(Level.PROBLEM, "locked memory", f"limited on {_hosts(locked)}", fix)


def _disks(examined: Examined) -> Iterator[Finding]:
    for place in examined.nodes[0].free_bytes:
        free = [(node.host, node.free_bytes.get(place, 0)) for node in examined.nodes]
        host, least = min(free, key=lambda entry: entry[1])
        found = f"{least / GB:.1f} GB free" + (f" on {host}" if len(free) > 1 else "")
        if least < MIN_FREE_BYTES:
            level = Level.PROBLEM if least < NO_SPACE_BYTES else Level.WARNING
            fix = "make room, or train.output_dir elsewhere" if place == "output_dir" else "make room, or set TMPDIR"
            yield Finding(level, place, found, fix)
        else:
            yield Finding(Level.OK, place, found)


def _data(examined: Examined) -> Iterator[Finding]:
    config, nodes = examined.config, examined.nodes
    if config is None:
        return
    per_node = config.train.balance_scope == "node"
    for position, first in enumerate(nodes[0].sources):
        seen = [(node.host, node.sources[position]) for node in nodes]
        counts = [(host, f"{counted(facts.num_shards, 'file')}, {_size(facts.num_bytes)}") for host, facts in seen]
        missing = [host for host, facts in seen if facts.num_shards == 0]
        what = f"data: {first.path}"
        if missing:
            yield Finding(
                Level.PROBLEM, what, f"not there on {_hosts(missing)}", "a path that all nodes see, or a URL (s3://, …)"
            )
        elif len({count for _, count in counts}) > 1 and not per_node:
            fix = "the same files on all nodes, or train.balance_scope: node for shards staged per node"
            yield Finding(Level.PROBLEM, what, _grouped(counts), fix)
        else:
            yield Finding(Level.OK, what, counts[0][1])
    num_train = sum(facts.num_shards for facts in nodes[0].sources[: len(config.data.train)])
    if per_node and 0 < num_train < len(nodes):
        fix = "cut into more shards (vlm-dist shards build), or train.balance_scope: world"
        yield Finding(Level.PROBLEM, "shards", f"{num_train} for {len(nodes)} nodes", fix)
    rates = [(node.host, node.read_rate) for node in nodes if node.read_rate is not None]
    if rates:
        host, slowest = min(rates, key=lambda entry: entry[1])
        found = f"{slowest / MB:,.0f} MB/s" + (f" on {host}, the slowest" if len(rates) > 1 else "")
        level = Level.WARNING if slowest < MIN_READ_RATE else Level.OK
        fix = "shards on a faster or node-local disk, or larger ones" if level is Level.WARNING else ""
        yield Finding(level, "reading shards", found, fix)


def _links(examined: Examined) -> Iterator[Finding]:
    links = examined.links
    if links is None:
        fix = "vlm-dist launch RUN.yaml --doctor examines several" if examined.nodes[0].gpus else ""
        yield Finding(Level.OK, "links", "not measured, with one process", fix)
        return
    for facts in examined.nodes:
        if facts.interface:
            yield Finding(Level.OK, "interface", facts.interface)
    for node, rate in links.inside.items():
        yield Finding(Level.OK, f"all-reduce in {node}", f"{_rate(rate)}, {links.backend}")
    if links.across is not None:
        yield Finding(Level.OK, "all-reduce of nodes", f"{_rate(links.across)}, {links.backend}, one rank each")
    fastest = max(links.pairs.values(), default=0.0)
    for node, rate in links.pairs.items():
        level = Level.WARNING if rate < SLOW_LINK * fastest else Level.OK
        fix = (
            f"look at the cable, the port and the interface of {node} (ethtool, ibstat)"
            if level is Level.WARNING
            else ""
        )
        yield Finding(level, f"link to {node}", _rate(rate), fix)
    wrong = {node: ahead for node, ahead in links.clock_seconds.items() if abs(ahead) > MAX_CLOCK_SECONDS}
    for node, ahead in wrong.items():
        found = f"{node} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
        yield Finding(Level.WARNING, "clocks", found, "chrony or ntpd on it; times in logs and of files are wrong")
    if not wrong and len(links.clock_seconds) > 1:
        widest = max(abs(ahead) for ahead in links.clock_seconds.values())
        yield Finding(Level.OK, "clocks", f"within {max(widest, 0.01):.2f} s")
    if links.unseen:
        found = f"what the first node writes is not there on {_hosts(links.unseen)}"
        yield Finding(
            Level.PROBLEM,
            "shared file system",
            found,
            "train.output_dir on one that all nodes mount (see docs/checkpoints.md)",
        )
    elif len(links.clock_seconds) > 1:
        yield Finding(Level.OK, "shared file system", "all nodes see output_dir")


def _zero(examined: Examined) -> Iterator[Finding]:
    links, config, size = examined.links, examined.config, examined.model
    if links is None or config is None or size is None:
        return
    several = links.across is not None
    slowest = min(
        [*([links.across] if links.across is not None else links.inside.values()), *links.pairs.values()], default=0.0
    )
    if slowest <= 0:
        return
    accumulation = config.train.gradient_accumulation_steps
    cost = zero_cost(size, accumulation, examined.num_ranks, slowest)
    memory = min((memory for node in examined.nodes for _, memory in node.gpus), default=None)
    found = (
        f"a step sends {_size(cost.zero2_bytes)} under ZeRO-2 ({cost.zero2_seconds:.2g} s at {_rate(slowest)}), "
        f"{_size(cost.zero3_bytes)} under ZeRO-3 ({cost.zero3_seconds:.2g} s)"
    )
    yield Finding(Level.OK, "ZeRO", found, advise(size, cost, accumulation, memory, several_nodes=several))


def _rate(bytes_per_second: float) -> str:
    bits = bytes_per_second * 8
    link = f"{bits / GB:.1f} Gbit/s" if bits >= GB else f"{bits / MB:.0f} Mbit/s"
    return f"{_size(bytes_per_second)}/s ({link})"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB else f"{num_bytes / MB:.1f} MB"


Check = Callable[[Examined], Iterator[Finding]]

#: In the order of the table, within one level.
CHECKS: tuple[Check, ...] = (_gpus, _links, _zero, _data, _disks, _limits, _versions)
