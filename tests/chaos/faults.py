"""The table of faults: kinds, and for each a seeded number of single faults."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import networks
from tests.chaos.runs import Layout, Start
from vlm_dist.errors import ExitCode

NUM_STEPS = 10
SAVE_STEPS = 3
SAVED = (3, 6, 9)
EVALUATED = (4, 8)
#: Where a save fails: those since the one before it, and those that are done until all ranks have heard of it.
LOST_WITH_A_SAVE = SAVE_STEPS + 2

TWO = Layout(2)
ONE = Layout(1)
FOUR = Layout(4)
THREE = Layout(2, zero=3)
COMMAND = Layout(2, command_line=True)

KILL, TERM, INT, USR1, STOP = (int(getattr(signal, f"SIG{name}")) for name in ("KILL", "TERM", "INT", "USR1", "STOP"))

#: No phase of a step takes so long, also where the machine is busy.
HANG_SECONDS = 15.0

#: One sample whose decoder is what the fault says; left out by hand in the run that it is compared with.
BAD_SAMPLE = {"source": "images", "key": "000007"}

WORKERS = ("train.dataloader_num_workers=1",)
PREEMPTED = frozenset({int(ExitCode.PREEMPTED)})
STOPPED_AT_ONCE = frozenset({130, -INT, int(ExitCode.DISTRIBUTED), int(ExitCode.FAILURE)})
LOST_PEER = frozenset({int(ExitCode.DISTRIBUTED), int(ExitCode.HANG), -KILL, -TERM, 256 - KILL, 128 + KILL})


@dataclass
class Fault:
    """One fault.

    Attributes:
        kind: which of the kinds.
        what: in words, with step and rank.
        layout: of the first start.
        actions: of `tests.chaos.inject` in the first start.
        always: actions in all starts.
        overrides: of all starts.
        resume_layout: of the later starts; None: as the first.
        drive: done by the campaign while the first start goes on; gives back True when it has been done.
        before: done before the first start, given the output directory.
        between: done after the first start, given the output directory.
        codes: exit codes that are right for the first start; None: it is to complete.
        says: regular expression that the first start's output must have.
        resume_says: the same of the second start.
        max_lost: steps that may be lost.
        reference: what it is to equal: "plain", "left_out" or "corrupt".
        timeout_seconds: for the first start.
        supervisor_seconds: after the first rank's end the rest get SIGKILL then; None: never.
        seconds_to_detect: the most that it may take until all processes are gone.
        needs_root: it mounts something, or makes a network.
        must_end: the first start may not go on to its last step.
        has_networks: each rank of the first start is on a network of its own.
    """

    kind: str
    what: str
    layout: Layout = TWO
    actions: Sequence[Mapping[str, Any]] = ()
    always: Sequence[Mapping[str, Any]] = ()
    overrides: Sequence[str] = ()
    resume_layout: Layout | None = None
    drive: Callable[[Start, Path, Callable[[], None]], bool] | None = None
    before: Callable[[Path], None] | None = None
    between: Callable[[Path], None] | None = None
    codes: frozenset[int] | None = None
    says: str | None = None
    resume_says: str | None = None
    max_lost: int = SAVE_STEPS
    reference: str = "plain"
    timeout_seconds: float = 240.0
    supervisor_seconds: float | None = None
    seconds_to_detect: float = 90.0
    needs_root: bool = False
    must_end: bool = False  # the first start may not go on to the last step
    has_networks: bool = False  # each rank of the first start is on a network of its own
    name: str = field(default="")


Kind = Callable[[random.Random], Iterator[Fault]]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of fault."""

    def register(make: Kind) -> Kind:
        KINDS[name] = make
        return make

    return register


def make_faults(seed: int, only: str | None = None) -> list[Fault]:
    """All faults of a seed, or those of kinds whose name matches `only`."""
    faults = []
    for name, make in KINDS.items():
        if only is None or re.search(only, name):
            for number, fault in enumerate(make(random.Random(f"{seed}/{name}"))):
                fault.kind, fault.name = name, f"{name.replace(' ', '-')}-{number}"
                faults.append(fault)
    return faults


def send(point: str, *signals: int, **where: Any) -> dict[str, Any]:
    """An action: the process gets signals at a point."""
    return {"point": point, "do": "signal", "signals": list(signals), **where}


def _place(
    rng: random.Random, points: Sequence[str] = ("data_wait", "forward", "update", "saving", "evaluation")
) -> Any:
    point = rng.choice(points)
    if point == "saving":
        return point, rng.choice(SAVED)
    return point, rng.choice(EVALUATED) if point == "evaluation" else rng.randrange(1, NUM_STEPS - 1)


@kind("rank killed")
def _rank_killed(rng: random.Random) -> Iterator[Fault]:
    for layout in (TWO, TWO, FOUR, THREE, COMMAND):
        point, step = _place(rng)
        rank = rng.randrange(layout.ranks)
        yield Fault(
            "", f"SIGKILL of rank {rank} at {point} {step}", layout,
            [send(point, KILL, step=step, rank=rank)],
            codes=LOST_PEER, says="another rank is gone|rank is gone|is gone|exits with return code = -9",
        )  # fmt: skip


@kind("rank killed at a random moment")
def _rank_killed_at_random(rng: random.Random) -> Iterator[Fault]:
    for layout in (TWO, FOUR, THREE, COMMAND):
        rank = rng.randrange(layout.ranks)
        moment = _at_random_moment(rng, lambda start, rank=rank: start.rank_pids()[rank])
        yield Fault("", f"SIGKILL of rank {rank} {moment.__doc__}", layout, drive=moment, codes=LOST_PEER)


def _at_random_moment(rng: random.Random, whom: Callable[[Start], int], number: int = KILL) -> Any:
    """Kill a process some time after a step that it has done."""
    after, pause = rng.randrange(0, NUM_STEPS - 3), rng.uniform(0, 0.4)

    def act(start: Start, output_dir: Path, note: Callable[[], None]) -> bool:
        if _num_lines(output_dir / "ledger" / "rank-00000.jsonl") < after + 2:
            return False
        time.sleep(pause)
        note()
        os.kill(whom(start), number)
        return True

    act.__doc__ = f"{pause:.2f} s after step {after}"
    return act


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@kind("data worker killed")
def _worker_killed(rng: random.Random) -> Iterator[Fault]:
    for layout in (TWO, TWO, THREE, COMMAND):
        step, rank = rng.randrange(NUM_STEPS), rng.randrange(2)
        yield Fault(
            "", f"SIGKILL of a worker of rank {rank} at step {step}", layout,
            [send("worker", KILL, step=step, rank=rank)],
            overrides=WORKERS, max_lost=0, says="a data worker .*it is replaced",
        )  # fmt: skip


@kind("launcher killed")
def _launcher_killed(rng: random.Random) -> Iterator[Fault]:
    for which in ("parent", "command", "parent"):
        step = rng.randrange(1, NUM_STEPS - 2)
        yield Fault(
            "", f"SIGKILL of the {'starting process' if which == 'parent' else 'deepspeed command'} at step {step}",
            COMMAND,
            [send("update", KILL, step=step, rank=0, whom="launcher", which=which),
             {"point": "update", "do": "hang", "seconds": 6, "always": True}],
            codes=frozenset({-KILL, 256 - KILL, 128 + KILL, 1}), must_end=True,
        )  # fmt: skip


def _signals(name: str, numbers: tuple[int, ...], codes: frozenset[int], layouts: Sequence[Layout]) -> Kind:
    def make(rng: random.Random) -> Iterator[Fault]:
        startup = rng.choice(("before_groups", "groups", "engine", "loop"))
        points: list[tuple[str, dict[str, Any]]] = [
            ("startup", {"at": startup}),
            ("data_wait", {"step": rng.randrange(1, NUM_STEPS - 1)}),
            ("forward", {"step": rng.randrange(1, NUM_STEPS - 1)}),
            ("evaluation", {"step": rng.choice(EVALUATED)}),
            ("saving", {"step": rng.choice(SAVED)}),
        ]
        for (point, where), layout in zip(points, layouts, strict=True):
            rank = rng.randrange(layout.ranks)
            told = ", ".join(f"{key} {value}" for key, value in where.items())
            yield Fault(
                "", f"{name} to rank {rank} in {point} ({told})", layout,
                [send(point, *numbers, rank=rank, whom="group" if len(numbers) > 1 else "self", **where)],
                codes=codes, max_lost=0 if codes == PREEMPTED else SAVE_STEPS,
                says="by a signal at" if codes == PREEMPTED else None,
            )  # fmt: skip

    return make


KINDS["SIGUSR1"] = _signals("SIGUSR1", (USR1,), PREEMPTED, (TWO, COMMAND, FOUR, TWO, THREE))
KINDS["SIGTERM"] = _signals("SIGTERM", (TERM,), PREEMPTED, (THREE, TWO, COMMAND, FOUR, TWO))
KINDS["SIGINT once"] = _signals("SIGINT", (INT,), PREEMPTED, (TWO, FOUR, TWO, COMMAND, TWO))
KINDS["SIGINT twice"] = _signals("SIGINT twice", (INT, INT), STOPPED_AT_ONCE, (TWO, TWO, FOUR, TWO, THREE))


@kind("disk full")
def _disk_full(rng: random.Random) -> Iterator[Fault]:
    step = rng.choice(SAVED)
    failed = frozenset({int(ExitCode.CHECKPOINT)})
    yield Fault(
        "", f"no file may grow (RLIMIT_FSIZE) in the save of step {step}", TWO,
        [{"point": "saving", "do": "file_limit", "bytes": 20_000, "step": step, "rank": 0}],
        codes=failed, max_lost=LOST_WITH_A_SAVE, says="could not be written",
    )  # fmt: skip
    step = rng.choice(SAVED)
    yield Fault(
        "", f"ENOSPC from the file layer in the save of step {step}", FOUR,
        [{"point": "writing", "do": "error", "errno": 28, "step": step, "rank": 0}],
        codes=failed, max_lost=LOST_WITH_A_SAVE, says="No space left",
    )  # fmt: skip
    for layout in (TWO, COMMAND):
        step = rng.choice(SAVED)
        yield Fault(
            "", f"a file system that is full in the save of step {step}", layout,
            [{"point": "saving", "do": "command", "step": step, "rank": 0,
              "command": "head -c 64000000 /dev/zero > {output_dir}/filler 2>/dev/null; true"}],
            codes=failed, max_lost=LOST_WITH_A_SAVE, says="No space left|could not be written",
            needs_root=True, before=lambda path: _mount(path, "tmpfs", "size=8m"),
            between=lambda path: (path / "filler").unlink(),
        )  # fmt: skip


def _mount(path: Path, what: str, options: str) -> None:
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", what, "-o", options, what, str(path)], check=True)


def _mount_read_only(path: Path) -> None:
    _mount(path, "tmpfs", "size=32m")
    _remount(path, "ro")


def _remount(path: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(path)], check=True)


@kind("read-only output directory")
def _read_only(rng: random.Random) -> Iterator[Fault]:
    yield Fault(
        "", "read-only from the start", TWO, needs_root=True, before=_mount_read_only,
        between=lambda path: _remount(path, "rw"), codes=frozenset({int(ExitCode.CONFIG)}), says="cannot write to",
    )  # fmt: skip
    for layout in (TWO, COMMAND):
        step = rng.choice(SAVED)
        # an open file that is written to forbids it: so the error comes from the file layer
        yield Fault(
            "", f"read-only (EROFS) in the save of step {step}", layout,
            [{"point": "writing", "do": "error", "errno": 30, "step": step, "rank": 0}],
            codes=frozenset({int(ExitCode.CHECKPOINT)}), max_lost=LOST_WITH_A_SAVE,
            says="could not be written.*Read-only",
        )  # fmt: skip


def _truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "training_state.safetensors", 5000)


def _flip(checkpoint: Path) -> None:
    path = checkpoint / "training_state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated file": (_truncate, "skipped: .*damaged"),
    "a flipped bit": (_flip, "skipped: .*damaged"),
    "a missing file": (lambda path: (path / "adapter_model.safetensors").unlink(), "skipped: .*"),
    "no marker": (lambda path: (path / "COMPLETE").unlink(), "skipped: .*incomplete"),
    "an empty marker": (lambda path: (path / "COMPLETE").write_text(""), "skipped: .*"),
    "an empty state": (lambda path: (path / "training_state.json").write_text(""), "skipped: .*"),
}


@kind("checkpoint damaged at rest")
def _damaged(rng: random.Random) -> Iterator[Fault]:
    layouts = [TWO, THREE, FOUR, TWO, ONE, COMMAND]
    for (what, (damage, says)), layout in zip(DAMAGES.items(), layouts, strict=True):
        rank = rng.randrange(layout.ranks)
        yield Fault(
            "", f"{what} in the newest of two checkpoints", layout, [send("update", KILL, step=8, rank=rank)],
            codes=LOST_PEER, max_lost=2 * SAVE_STEPS, resume_says=says,
            between=lambda path, damage=damage: damage(newest(path)),
        )  # fmt: skip


def newest(output_dir: Path) -> Path:
    """The checkpoint of most steps."""
    return max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


@kind("resumed on another layout")
def _layout_change(rng: random.Random) -> Iterator[Fault]:
    for layout, resume in (
        (TWO, ONE),
        (FOUR, TWO),
        (TWO, FOUR),
        (THREE, TWO),
        (TWO, THREE),
        (FOUR, ONE),
        (COMMAND, FOUR),
    ):
        point, step = _place(rng)
        rank = rng.randrange(layout.ranks)
        yield Fault(
            "", f"SIGKILL of rank {rank} at {point} {step}, resumed as {resume}", layout,
            [send(point, KILL, step=step, rank=rank)], resume_layout=resume, codes=LOST_PEER,
        )  # fmt: skip


@kind("hanging decoder")
def _hanging_decoder(rng: random.Random) -> Iterator[Fault]:
    quick = (*WORKERS, "data.sample_timeout_seconds=2")
    for layout in (TWO, THREE):
        step, rank = rng.randrange(NUM_STEPS), rng.randrange(2)
        yield Fault(
            "", f"a worker of rank {rank} hangs once at step {step}", layout,
            [{"point": "decode", "do": "hang", "step": step, "rank": rank}],
            overrides=quick, max_lost=0, says="it is replaced",
        )  # fmt: skip
    yield Fault(
        "", f"the decoder hangs for ever at {BAD_SAMPLE['key']}", TWO,
        always=[{"point": "decode", "do": "hang", "always": True, **BAD_SAMPLE}],
        overrides=quick, max_lost=0, reference="left_out", says="timeout",
    )  # fmt: skip


@kind("crashing decoder")
def _crashing_decoder(rng: random.Random) -> Iterator[Fault]:
    for layout in (TWO, COMMAND):
        step, rank = rng.randrange(NUM_STEPS), rng.randrange(2)
        yield Fault(
            "", f"SIGSEGV in a worker of rank {rank}, once, at step {step}", layout,
            [{"point": "decode", "do": "crash", "step": step, "rank": rank}],
            overrides=WORKERS, max_lost=0, says="it is replaced",
        )  # fmt: skip
    yield Fault(
        "", f"the decoder crashes at {BAD_SAMPLE['key']} whenever it is tried", TWO,
        always=[{"point": "decode", "do": "crash", "always": True, **BAD_SAMPLE}],
        overrides=WORKERS, max_lost=0, reference="left_out", says="crash",
    )  # fmt: skip


@kind("corrupt sample")
def _corrupt_sample(rng: random.Random) -> Iterator[Fault]:
    for layout in (TWO, FOUR, COMMAND):
        step, rank = rng.randrange(2, NUM_STEPS - 1), rng.randrange(layout.ranks)
        yield Fault(
            "", f"a damaged picture in a shard, and SIGKILL of rank {rank} at step {step}", layout,
            [send("update", KILL, step=step, rank=rank)], codes=LOST_PEER, reference="corrupt",
        )  # fmt: skip


@kind("shard unreadable for a while")
def _shard_unreadable(rng: random.Random) -> Iterator[Fault]:
    failed = frozenset({int(ExitCode.DATA)})
    for layout, overrides in ((TWO, ()), (FOUR, ()), (TWO, WORKERS)):
        step, rank = rng.randrange(1, NUM_STEPS - 1), rng.randrange(layout.ranks)
        yield Fault(
            "", f"EIO from storage, rank {rank}, step {step}{' in a worker' if overrides else ''}", layout,
            [{"point": "worker", "do": "error", "errno": 5, "step": step, "rank": rank}],
            codes=failed, max_lost=0, overrides=overrides, says="Input/output error",
        )  # fmt: skip
    yield Fault(
        "", "a shard is gone when the run starts", COMMAND,
        before=lambda path: _move_shard(path, away=True), between=lambda path: _move_shard(path, away=False),
        codes=failed, says=r"images-000000\.tar|images",
    )  # fmt: skip


def _move_shard(output_dir: Path, *, away: bool) -> None:
    shard = sorted((output_dir.parent / "data" / "images").glob("*.tar*"))[0]
    if away:
        shard.rename(shard.with_name(f"{shard.name}.away"))
    else:
        shard.rename(shard.with_name(shard.name.removesuffix(".away")))


@kind("hung rank")
def _hung_rank(rng: random.Random) -> Iterator[Fault]:
    """The others' watchdog, or its own, ends it; a stopped process is ended by whoever started it."""
    watched = (f"train.hang_timeout_minutes={HANG_SECONDS / 60:.4f}",)
    codes = frozenset({int(ExitCode.HANG), -KILL}) | LOST_PEER
    for layout, point in ((TWO, "forward"), (FOUR, "update"), (THREE, "data_wait")):
        step, rank = rng.randrange(1, NUM_STEPS - 1), rng.randrange(layout.ranks)
        yield Fault(
            "", f"rank {rank} sleeps for ever in {point} {step}", layout,
            [{"point": point, "do": "hang", "step": step, "rank": rank}],
            codes=codes, overrides=watched, says=f"rank {rank}", supervisor_seconds=30.0,
        )  # fmt: skip
    for layout, point in ((TWO, "forward"), (TWO, "evaluation"), (COMMAND, "update")):
        step = rng.choice(EVALUATED) if point == "evaluation" else rng.randrange(1, NUM_STEPS - 1)
        rank = rng.randrange(2)
        yield Fault(
            "", f"SIGSTOP of rank {rank} in {point} {step}", layout, [send(point, STOP, step=step, rank=rank)],
            codes=codes | {256 - KILL, 128 + KILL}, overrides=watched, supervisor_seconds=30.0,
        )  # fmt: skip


@kind("clock jump")
def _clock_jump(rng: random.Random) -> Iterator[Fault]:
    for seconds, layout in ((86_400.0, TWO), (-86_400.0, THREE), (-1.7e9, TWO), (3.0e8, COMMAND)):
        step, rank = rng.randrange(1, NUM_STEPS - 1), rng.randrange(2)
        yield Fault(
            "", f"the clock of rank {rank} jumps by {seconds:+.0f} s at step {step}", layout,
            [{"point": "data_wait", "do": "clock", "seconds": seconds, "step": step, "rank": rank}],
            max_lost=0, overrides=WORKERS,
        )  # fmt: skip


@kind("connections lost")
def _connections_lost(rng: random.Random) -> Iterator[Fault]:
    for layout in (TWO, FOUR, THREE, COMMAND):
        point, step = _place(rng, ("data_wait", "forward", "update"))
        rank = rng.randrange(layout.ranks)
        yield Fault(
            "", f"every connection of rank {rank} is cut at {point} {step}", layout,
            [{"point": point, "do": "cut_connections", "step": step, "rank": rank}],
            codes=LOST_PEER, says="is gone",
        )  # fmt: skip


@kind("network silent")
def _network_silent(rng: random.Random) -> Iterator[Fault]:
    """Each rank in a network of its own; the link between them goes down, and no packet says so."""
    watched = (f"train.hang_timeout_minutes={HANG_SECONDS / 60:.4f}",)
    for layout, point in ((TWO, "forward"), (THREE, "update"), (TWO, "data_wait")):
        step = rng.randrange(1, NUM_STEPS - 1)
        yield Fault(
            "", f"the link between two ranks goes down at {point} {step}", layout,
            [{"point": point, "do": "command", "step": step, "rank": 1, "command": networks.CUT}],
            codes=frozenset({int(ExitCode.HANG)}) | LOST_PEER, overrides=watched, supervisor_seconds=30.0,
            has_networks=True, needs_root=True,
        )  # fmt: skip


def remove(path: Path) -> None:
    """Delete an output directory, whatever is mounted there."""
    if path.is_mount():
        subprocess.run(["umount", "-l", str(path)], check=False)
    shutil.rmtree(path, ignore_errors=True)
