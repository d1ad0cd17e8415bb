"""From "this run, there" to one command line and its environment; nothing is started here."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.hosts import make_export_file, quote_for_hosts, read_hostfile
from launcher.sbatch_script import fill_options, fill_run, fill_variables, placeholders, read_template
from vlm_dist.config.masking import masked
from vlm_dist.distributed.environment import in_slurm_step
from vlm_dist.distributed.rendezvous import FIRST_PORT, NUM_PORTS
from vlm_dist.errors import ConfigError

#: Whoever starts several runs on a machine shall not have to know their ports.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EXPORT_FILE = "DS_ENV_FILE"


@dataclass(frozen=True)
class Request:
    """What the user has asked for.

    Attributes:
        run: run file.
        overrides: of `--set`.
        target: local, hostfile, allocation (inside one of Slurm) or slurm (a new job).
        nodes: None: as many as there are.
        gpus_per_node: processes of a node; None: as many as it has GPUs.
        hostfile: of target hostfile.
        max_restarts: None: without restarts; local only.
        master_addr: None: found by the launcher.
        master_port: None: chosen here, or from the job id.
        sbatch: name -> value of further options for sbatch.
        template: of the batch script; None: slurm/train.sbatch.
        variables: of the batch script, such as MODULES.
        doctor: examine the nodes in place of training.
    """

    run: Path
    overrides: tuple[str, ...] = ()
    target: str = "local"
    nodes: int | None = None
    gpus_per_node: int | None = None
    hostfile: Path | None = None
    max_restarts: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    sbatch: Mapping[str, str] = field(default_factory=dict)
    template: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    doctor: bool = False

    @property
    def module(self) -> list[str]:
        """What each rank runs: a module and its arguments."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        if self.doctor:
            return ["vlm_dist.cli", "doctor", "--run", str(self.run), *sets]
        return ["vlm_dist.train", "--config", str(self.run), *sets]


@dataclass(frozen=True)
class LaunchPlan:
    """One command line and what belongs to it.

    Attributes:
        title: one line that says what happens.
        command: and its arguments.
        environment: variables to set.
        unset: variables to take out.
        standard_input: text for the command.
        export_file: content of a temporary file, whose path goes into DS_ENV_FILE.
        translated: signal -> what the command is sent in its place.
        notices: what is worth a line.
        hosts: where ssh has to work before it starts.
    """

    title: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    standard_input: str | None = None
    export_file: str | None = None
    translated: Mapping[int, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def as_shell(self) -> str:
        """The plan as lines that a shell would run."""
        lines = [f"# {self.title}", *(f"# notice: {notice}" for notice in self.notices)]
        if self.unset:
            lines.append(f"unset {' '.join(self.unset)}")
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.export_file is not None:
            lines += [f"export {EXPORT_FILE}=$(mktemp)", f"cat > \"${EXPORT_FILE}\" <<'END_OF_EXPORTS'"]
            lines += [*self.export_file.splitlines(), "END_OF_EXPORTS"]
        command = shlex.join(self.command)
        if self.standard_input is not None:
            command += f" <<'END_OF_SCRIPT'\n{self.standard_input}END_OF_SCRIPT"
        return "\n".join([*lines, command]) + "\n"


def make_plan(request: Request, environ: Mapping[str, str]) -> LaunchPlan:
    """Decide what to start.

    Args:
        request: of the user.
        environ: of this process.

    Raises:
        ConfigError: options contradict each other, or something that they need is not there.
    """
    makers: dict[str, Callable[[Request, Mapping[str, str]], LaunchPlan]] = {
        "local": _local,
        "hostfile": _hostfile,
        "allocation": _allocation,
        "slurm": _slurm,
    }
    if request.max_restarts is not None and request.target != "local":
        raise ConfigError(
            "--max-restarts is for this machine. Jobs of Slurm are requeued by slurm/train.sbatch itself; on hosts, "
            "start vlm-dist-elastic on each of them"
        )
    return makers[request.target](request, environ)


def _local(request: Request, environ: Mapping[str, str]) -> LaunchPlan:
    if (request.nodes or 1) > 1:
        raise ConfigError(f"--nodes {request.nodes}: say where they are: --hostfile FILE, or --slurm")
    gpus = count_gpus(environ)
    processes = request.gpus_per_node or gpus or 1
    if gpus and processes > gpus and environ.get("DS_ACCELERATOR") != "cpu":
        raise ConfigError(f"--gpus-per-node {processes}: this machine shows {gpus}; DS_ACCELERATOR=cpu runs on the CPU")
    kind = "GPU" if gpus and environ.get("DS_ACCELERATOR") != "cpu" else "CPU"
    where = f"{processes} process{'es' if processes > 1 else ''} on this machine ({kind})"
    devices = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")][:processes]
    # DeepSpeed's runner knows devices by number only; torchrun's agent leaves them as they are
    has_names = kind == "GPU" and any(name and not name.isdigit() for name in devices)
    if request.max_restarts is not None or has_names:
        restarts = request.max_restarts or 0
        command = [sys.executable, "-m", "launcher.elastic", "--nproc_per_node", str(processes)]
        command += ["--max_restarts", str(restarts), "-m", *request.module]
        return LaunchPlan(f"{where}, restarted up to {restarts} times", tuple(command), unset=_left(environ))
    if processes == 1 and request.gpus_per_node is None and not gpus:
        command = [sys.executable, "-m", *request.module]
        return LaunchPlan(where, tuple(command), unset=_left(environ))
    command = _deepspeed(request)
    if kind == "GPU" and devices[0]:
        # with --num_gpus it would take the first ones of the machine, whatever the variable says
        command += ["--include", f"localhost:{','.join(devices)}"]
    else:
        command += ["--num_gpus", str(processes)]
    command += ["--master_port", str(request.master_port or free_port_here()), "-m", *request.module]
    return LaunchPlan(where, tuple(command), unset=_left(environ))


def _hostfile(request: Request, environ: Mapping[str, str]) -> LaunchPlan:
    assert request.hostfile is not None
    hosts = read_hostfile(request.hostfile)
    names = list(hosts)[: request.nodes]
    if request.nodes is not None and len(names) < request.nodes:
        raise ConfigError(f"--nodes {request.nodes}: {request.hostfile} has {len(names)}")
    for name in ("ssh", "pdsh") if len(names) > 1 else ("ssh",):
        _require_command(name, f"--hostfile {request.hostfile}")
    slots = {name: request.gpus_per_node or hosts[name] for name in names}
    command = [*_deepspeed(request), "--hostfile", str(request.hostfile)]
    if request.nodes is not None:
        command += ["--num_nodes", str(request.nodes)]
    if request.gpus_per_node is not None:
        command += ["--num_gpus", str(request.gpus_per_node)]
    if request.master_addr is not None:
        command += ["--master_addr", request.master_addr]
    command += ["--master_port", str(request.master_port or unlikely_port()), "-m"]
    # with one host the runner starts the ranks itself, without a shell that would take quotes off again
    command += quote_for_hosts(request.module) if len(names) > 1 else request.module
    exports = make_export_file(environ)
    listed = ", ".join(f"{name} ({count})" for name, count in slots.items())
    return LaunchPlan(
        f"{sum(slots.values())} processes on {listed}, over ssh",
        tuple(command),
        unset=_left(environ),
        export_file=exports.text if len(names) > 1 else None,
        notices=exports.notices if len(names) > 1 else (),
        # doctor tells of hosts that do not answer by itself
        hosts=tuple(names) if len(names) > 1 and not request.doctor else (),
    )


def _allocation(request: Request, environ: Mapping[str, str]) -> LaunchPlan:
    """Inside salloc or a batch script: a step of this job."""
    _require_command("srun", "in this allocation")
    nodes = request.nodes or _number(environ, "SLURM_JOB_NUM_NODES")
    command = ["srun", "--export=ALL", "--kill-on-bad-exit=1"]
    if in_slurm_step(environ):
        if (_number(environ, "SLURM_STEP_NUM_TASKS") or 1) > 1:
            raise ConfigError(
                f"srun has started this {environ['SLURM_STEP_NUM_TASKS']} times (SLURM_STEP_NUM_TASKS); start vlm-dist "
                "launch once, without srun"
            )
        command.append("--overlap")  # the shell of `srun --pty bash` holds what this step needs, and it would wait
    if nodes is not None:
        command.append(f"--nodes={nodes}")
    if request.gpus_per_node is not None:
        command.append(f"--ntasks-per-node={request.gpus_per_node}")
        if nodes is not None:
            command.append(f"--ntasks={nodes * request.gpus_per_node}")
    if (cores := _number(environ, "SLURM_CPUS_PER_TASK")) is not None:
        command.append(f"--cpus-per-task={cores}")
    command += [sys.executable, "-m", *request.module]
    fixed = {} if request.master_addr is None else {"MASTER_ADDR": request.master_addr}
    if request.master_port is not None:
        fixed["MASTER_PORT"] = str(request.master_port)
    if len(fixed) == 1:
        raise ConfigError(
            "--master-addr and --master-port go together in an allocation; without both Slurm's job tells"
        )
    tasks = f"{request.gpus_per_node} tasks on each node" if request.gpus_per_node else "the job's tasks"
    return LaunchPlan(
        f"job {environ['SLURM_JOB_ID']}: {tasks}, {nodes or '?'} node(s), with srun",
        tuple(command),
        environment={**fixed, "PYTHONUNBUFFERED": "1"},
        unset=tuple(name for name in _left(environ) if name not in fixed),
        # srun takes one Ctrl-C for a question, and the second for "kill all"
        translated={signal.SIGINT: signal.SIGTERM},
    )


def _slurm(request: Request, environ: Mapping[str, str]) -> LaunchPlan:
    if request.master_addr or request.master_port:
        raise ConfigError("--master-addr and --master-port: a job of Slurm has both from its nodes and its id")
    if request.doctor:
        _require_command("srun", "--slurm")
        flags = _flags(slurm_options(request, ""))
        command = ["srun", *flags, "--export=ALL", sys.executable, "-m", *request.module]
        return LaunchPlan("examine nodes of a job of its own", tuple(command), unset=_left(environ))
    _require_command("sbatch", "--slurm")
    template = read_template(request.template)
    options = slurm_options(request, template)
    flags = _flags(options)
    # lines that are the shipped script's placeholders would be refused, and no option can take a line back
    dropped: dict[str, str | None] = {name: None for name, value in options.items() if value is None}
    script = fill_options(_fill(template, request), dropped)
    notices = [f"no --{name} was given: the cluster's default" for name in dropped]
    return LaunchPlan("a job of Slurm", ("sbatch", *flags), standard_input=script, notices=tuple(notices))


def render(request: Request) -> str:
    """The batch script of a run, complete."""
    template = read_template(request.template)
    return fill_options(_fill(template, request), slurm_options(request, template))


def _fill(template: str, request: Request) -> str:
    return fill_variables(fill_run(template, request.run, request.overrides, _origin()), request.variables)


def slurm_options(request: Request, template: str) -> dict[str, str | None]:
    """Options of sbatch that differ from the template's; None: take the template's line out."""
    options: dict[str, str | None] = dict.fromkeys(placeholders(template))
    if request.nodes is not None:
        options["nodes"] = str(request.nodes)
    if request.gpus_per_node is not None:
        options["gpus-per-node"] = options["ntasks-per-node"] = str(request.gpus_per_node)
    return {**options, **request.sbatch}


def _flags(options: Mapping[str, str | None]) -> list[str]:
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items() if value is not None]


def count_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process here would see; without asking the driver, which takes a second."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name.strip()]
        return names.index("-1") if "-1" in names else len(names)
    return sum(1 for path in devices.glob("nvidia[0-9]*") if path.name[len("nvidia") :].isdigit())


def free_port_here() -> int:
    """A port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def unlikely_port() -> int:
    """A port for another machine, where nobody can ask whether it is free."""
    return FIRST_PORT + int.from_bytes(os.urandom(4), "big") % NUM_PORTS


def _deepspeed(request: Request) -> list[str]:
    command = [sys.executable, "-m", "launcher.deepspeed_cli"]
    # its --local_rank would stand before the subcommand
    return [*command, "--no_local_rank"] if request.doctor else command


def _left(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Variables of another launch that would be taken for this one's."""
    return tuple(name for name in _RANK_VARIABLES if environ.get(name))


def _origin() -> str:
    return shlex.join(["vlm-dist", *map(masked, sys.argv[1:])]).replace("\n", " ")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    return int(environ[name]) if environ.get(name, "").isdigit() else None


def _require_command(name: str, for_what: str) -> None:
    if shutil.which(name) is None:
        raise ConfigError(f"{for_what} needs the command {name}, which is not on the PATH of this machine")
