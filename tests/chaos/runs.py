"""Starts a run as plain processes or by the `deepspeed` command, waits for its end, and finds what it leaves behind."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.tiny_run import ROOT, TinyRun
from vlm_dist.distributed.group import free_port

PRELOAD = Path(__file__).parent / "preload"

#: How long processes of a run that has ended may still be there: a worker notices when its imports are done.
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Layout:
    """How many processes, started how, at which ZeRO stage."""

    ranks: int = 2
    zero: int = 2
    command_line: bool = False  # deepspeed --num_gpus N -m vlm_dist.train; else plain processes

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"deepspeed=ds_configs/tiny{self.zero}.json",)

    def __str__(self) -> str:
        return f"{'deepspeed' if self.command_line else 'plain'} {self.ranks} x ZeRO-{self.zero}"


@dataclass(frozen=True)
class Ended:
    """How one start of a run ended.

    Attributes:
        codes: exit codes, by rank, or of the command; negative where a signal ended it.
        output: what was printed, by rank.
        ended_at: when the last process was gone, in monotonic seconds.
        orphans: command lines of processes that were left.
        was_ended_by_hand: it did not end in time, and was killed.
    """

    codes: tuple[int, ...]
    output: str
    ended_at: float
    orphans: tuple[str, ...] = ()
    was_ended_by_hand: bool = False

    @property
    def is_complete(self) -> bool:
        return set(self.codes) == {0}


@dataclass
class Start:
    """One start of a run that is under way."""

    name: str
    logs: list[Path]
    pids: list[int]  # of the ranks, or of the command
    is_forked: bool
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all are gone."""
        for pid in self.pids:
            if pid in self.codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def rank_pids(self) -> list[int]:
        """The ranks' process ids, by rank."""
        if self.is_forked:
            return self.pids
        found = {}
        for process in _processes_of(self.name):
            try:
                if any(argument.startswith("--local_rank=") for argument in process.cmdline()):
                    rank = process.environ().get("RANK")
                    if rank is not None and "launcher.launch" not in " ".join(process.cmdline()):
                        found.setdefault(int(rank), process.pid)
            except psutil.Error:
                continue
        return [found[rank] for rank in sorted(found)]

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs)


def start(
    run: TinyRun,
    name: str,
    layout: Layout,
    overrides: Sequence[str],
    faults: Sequence[Mapping[str, Any]] = (),
    in_child: Callable[[int], None] | None = None,
) -> Start:
    """Start a run.

    Args:
        run: the working directory.
        name: of this start; unique, since processes are found by it.
        layout: of the ranks.
        overrides: of the configuration.
        faults: actions for `tests.chaos.inject`.
        in_child: called in each plain process with its rank, before anything else.
    """
    logs = run.directory / "logs"
    logs.mkdir(exist_ok=True)
    environment = run.environment() | {"CHAOS_RUN": name, "CHAOS": json.dumps(list(faults)) if faults else ""}
    environment["PYTHONPATH"] = f"{PRELOAD}:{environment['PYTHONPATH']}"
    overrides = [*layout.overrides, *overrides]
    if layout.command_line:
        log = logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                run.train_command(*overrides, processes=layout.ranks),
                cwd=run.directory,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return Start(name, [log], [process.pid], is_forked=False)
    port = str(free_port())
    arguments = ["--config", str(run.config)]
    for override in overrides:
        arguments += ["--set", override]
    started = Start(name, [], [], is_forked=True)
    for rank in range(layout.ranks):
        log = logs / f"{name}.rank{rank}.log"
        group = started.pids[0] if started.pids else 0
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.ranks, "LOCAL_WORLD_SIZE": layout.ranks}
        variables = environment | {key: str(value) for key, value in place.items()}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _become_rank(run, arguments, variables, log, group, (lambda r=rank: in_child(r)) if in_child else None)
        if group == 0:
            _set_group(pid, pid)
        started.logs.append(log)
        started.pids.append(pid)
    return started


def _set_group(pid: int, group: int) -> None:
    with contextlib.suppress(OSError):  # it has done so itself, or has ended
        os.setpgid(pid, group)


def _become_rank(
    run: TinyRun,
    arguments: list[str],
    variables: dict[str, str],
    log: Path,
    group: int,
    before: Callable[[], None] | None,
) -> None:
    """In the fork: be a process that has just been started, but for its imports."""
    code: Any = 1
    try:
        os.setpgid(0, group)
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(run.directory)
        os.environ.clear()
        os.environ.update(variables)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        atexit._clear()
        sys.modules["__main__"] = types.ModuleType("__main__")  # what workers would import again
        if before is not None:
            before()
        if variables["CHAOS"]:
            from tests.chaos import inject

            inject.install()
        from vlm_dist.train import main

        code = main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        import traceback

        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else int(code is not None))


def preload() -> None:
    """Import what every rank needs, before the first fork; no thread may be left by it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.qwen2_vl.modeling_qwen2_vl
    import transformers.models.qwen2_vl.processing_qwen2_vl  # noqa: F401

    import vlm_dist.build
    import vlm_dist.train  # noqa: F401


def wait(
    started: Start,
    timeout_seconds: float,
    while_waiting: Callable[[Start], bool] | None = None,
    kill_stopped_after: float | None = None,
) -> Ended:
    """Wait for the end of a start, and for the end of whatever it started.

    Args:
        started: the start.
        timeout_seconds: after which everything is killed, and the fault was not survived.
        while_waiting: called again and again until it gives back True.
        kill_stopped_after: once a rank has ended, the others have so many seconds before they get SIGKILL, as every
            supervisor does it (srun, the `deepspeed` command, torchrun); None: never.
    """
    deadline = time.monotonic() + timeout_seconds
    by_hand = False
    first_end: float | None = None
    while not started.poll():
        now = time.monotonic()
        if while_waiting is not None and while_waiting(started):
            while_waiting = None
        if started.codes and first_end is None:
            first_end = now
        if kill_stopped_after is not None and first_end is not None and now - first_end > kill_stopped_after:
            _kill([pid for pid in started.pids if pid not in started.codes])
            kill_stopped_after = None
        if now > deadline:
            by_hand = True
            _kill([*started.pids, *(process.pid for process in _processes_of(started.name))])
            deadline = now + 30
        time.sleep(0.02)
    limit = time.monotonic() + (GRACE_SECONDS if started.is_forked else 120)
    while (left := _processes_of(started.name)) and time.monotonic() < limit:
        time.sleep(0.1)
    ended_at = time.monotonic()
    orphans = tuple(_name(process) for process in left)
    _kill([process.pid for process in left])
    codes = tuple(started.codes[pid] for pid in started.pids)
    return Ended(codes, started.output(), ended_at, orphans, by_hand)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]} ({process.status()})"
    except psutil.Error:
        return str(process.pid)


def _processes_of(name: str) -> list[psutil.Process]:
    """Processes that carry the name of a start in their environment; those of plain ranks are its children."""
    wanted = f"CHAOS_RUN={name}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if wanted in (entry / "environ").read_bytes() + b"\0" and _state(entry) != "Z":
                found.append(psutil.Process(int(entry.name)))
        except (OSError, psutil.Error):
            continue
    return found


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]
