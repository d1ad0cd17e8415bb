"""The fault, from inside of the process that it befalls; the product knows nothing of it.

CHAOS holds JSON: a list of actions, each with the point at which it acts (`point`, `rank`, `step`, ...), what it does
(`do`), and the marker file that lets it happen once only, in whichever process comes first. The points are made by
wrapping functions of the product when their modules are imported.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_FILE_EVENTS = {"os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_files: dict[str, Any] = {"armed": False, "count": 0, "busy": False}


def actions() -> list[dict[str, Any]]:
    """What is to happen in processes that inherit this environment."""
    return json.loads(os.environ.get("CHAOS") or "[]")


def reach(point: str, step: int | None = None, **where: Any) -> None:
    """Say that the process is at a point; what is to happen here, happens."""
    for action in actions():
        if action["point"] != point or not _is_my_rank(action):
            continue
        if "step" in action and action["step"] != step:
            continue
        if any(action[name] != value for name, value in where.items() if name in action):
            continue
        if take(action):
            act(action)


def _is_my_rank(action: dict[str, Any]) -> bool:
    rank = action.get("rank")
    return rank is None or str(rank) == os.environ.get("RANK", "0")


def take(action: dict[str, Any]) -> bool:
    """Whether it is for this process to act: the marker is made by one alone, and tells the campaign when."""
    if action.get("always"):
        return True
    try:
        handle = os.open(action["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(handle, json.dumps({"pid": os.getpid(), "at": time.monotonic()}).encode())
    os.close(handle)
    return True


def act(action: dict[str, Any]) -> None:
    """Do what the action says, here and now."""
    do = action["do"]
    if do == "signal":
        _signal(action)
    elif do == "crash":
        ctypes.string_at(0)
    elif do == "hang":
        time.sleep(action.get("seconds", 100_000))
    elif do == "error":
        raise OSError(action.get("errno", 5), os.strerror(action.get("errno", 5)), action.get("path"))
    elif do == "skip":
        from vlm_dist.errors import SkipSample

        raise SkipSample("decode", "left out by hand")
    elif do == "file_limit":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (action["bytes"], resource.RLIM_INFINITY))
    elif do == "command":
        os.system(action["command"])
    elif do == "clock":
        jump_clock(action["seconds"])
    elif do == "cut_connections":
        cut_connections()
    else:
        raise ValueError(do)


def _signal(action: dict[str, Any]) -> None:
    for turn, number in enumerate(action["signals"]):
        if turn:
            time.sleep(action.get("gap_seconds", 0.2))
        whom = action.get("whom", "self")
        if whom == "self":
            os.kill(os.getpid(), number)
        elif whom == "group":
            os.killpg(os.getpgrp(), number)
        elif whom == "launcher":
            # the process that started the rank, and the command that started this one
            launcher = os.getppid()
            status = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()
            os.kill({"parent": launcher, "command": int(status[1])}[action.get("which", "parent")], number)
        elif whom == "worker":
            for child in _workers():
                os.kill(child, number)
                break
    time.sleep(action.get("pause_seconds", 0.0))


def _workers() -> list[int]:
    """Data workers of this rank: children of its fork server."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        if process.parent() and process.parent().pid != os.getpid() and "forkserver" in " ".join(process.cmdline()):
            found.append(process.pid)
    return found


def jump_clock(seconds: float) -> None:
    """The wall clock of this process jumps, as when a machine's clock is set."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds  # type: ignore[assignment]
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)  # type: ignore[assignment]


def cut_connections() -> None:
    """Every TCP connection of this process ends, as when a switch forgets it."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if not target.startswith("socket:"):
            continue
        duplicate = os.dup(int(entry.name))
        try:
            connection = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.getpeername()
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it listens, and has no peer
        connection.close()


# --- files ---------------------------------------------------------------------------------------------------------


def install_files() -> None:
    """Count what rank 0 does to the files of a checkpoint, and act before the n-th of it."""
    wanted = [action for action in actions() if action["point"] == "file"]
    if not wanted or not _is_my_rank(wanted[0]):
        return
    import pathlib

    (action,) = wanted
    fsync, open_path = os.fsync, pathlib.Path.open

    def counted_fsync(handle: int) -> None:
        _file_event(action, "fsync", str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def counted_open(self: pathlib.Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return open_path(self, mode, *args, **options)
        is_half = _file_event(action, "write", str(self), can_half=True)
        file = open_path(self, mode, *args, **options)
        return _Half(file) if is_half else file

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS:
            _file_event(action, event, " ".join(str(one) for one in arguments[:2] if isinstance(one, str | Path)))

    os.fsync = counted_fsync  # type: ignore[assignment]
    pathlib.Path.open = counted_open  # type: ignore[method-assign, assignment]
    sys.addaudithook(audit)


class _Half:
    """A file of which half of what is written first gets to the disk, and then the process is gone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: Any) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _file_event(action: dict[str, Any], kind: str, paths: str, can_half: bool = False) -> bool:
    """One thing that is about to be done to files; gives back whether it is to be done by half."""
    if _files["busy"] or (action["output_dir"] not in paths and not paths.startswith(action["output_name"])):
        return False
    _files["armed"] = action["ended_by"] not in paths and (_files["armed"] or action["armed_by"] in paths)
    if not _files["armed"] or ("checkpoint-" not in paths and kind != "fsync"):
        return False
    _files["busy"] = True
    number = _files["count"]
    _files["count"] += 1
    is_half = False
    if action["do"] == "log":
        with open(action["log"], "a") as log:  # noqa: PTH123 - Path.open is counted
            log.write(json.dumps({"number": number, "kind": kind, "paths": paths, "can_half": can_half}) + "\n")
    elif number == action["number"] and take(action):
        is_half = bool(action.get("half"))
        if not is_half:
            os.kill(os.getpid(), signal.SIGKILL)
    _files["busy"] = False
    return is_half


# --- points --------------------------------------------------------------------------------------------------------


def _before(owner: Any, name: str, tell: Callable[..., None]) -> None:
    """Call `tell` with the arguments of a function before it."""
    function = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        tell(*args, **options)
        return function(*args, **options)

    if isinstance(owner, type) and isinstance(vars(owner).get(name), classmethod):
        setattr(owner, name, classmethod(lambda cls, *args, **options: wrapped(*args, **options)))
    else:
        setattr(owner, name, wrapped)


_now = {"step": -1, "position": 0}


def _patch_trainer(module: ModuleType) -> None:
    def step(trainer: Any, fetched: Any) -> None:
        _now["step"] = fetched.plan.step
        reach("step", fetched.plan.step)

    def run(trainer: Any) -> None:
        install_files()
        reach("startup", at="loop")

    _before(module.Trainer, "_train_step", step)
    _before(module.Trainer, "run", run)


def _patch_feed(module: ModuleType) -> None:
    """A step is waited for; which one follows from the one before."""
    starts: dict[int, int] = {}

    def begin(feed: Any, *args: Any, start_step: int = 0, **options: Any) -> None:
        starts[id(feed)] = start_step

    def wait(feed: Any) -> None:
        number = starts.get(id(feed), 0)
        starts[id(feed)] = number + 1
        reach("data_wait", number)

    _before(module.StepFeed, "__init__", begin)
    _before(module.StepFeed, "__next__", wait)


def _patch_engine(module: ModuleType) -> None:
    for name in ("forward", "loss"):
        _before(module.Engine, name, lambda *args, **options: reach("forward", _now["step"]))
    _before(module.Engine, "step", lambda *args, **options: reach("update", _now["step"]))
    _before(module.Engine, "initialise", lambda *args, **options: reach("startup", at="engine"))
    _before(module.Engine, "collect_trainable", lambda *args, **options: reach("saving", _now["step"] + 1))


def _patch_evaluate(module: ModuleType) -> None:
    def measure(evaluator: Any, number: int, position: int) -> None:
        reach("evaluation", position, number=number)

    _before(module.Evaluator, "_measure_loss", measure)


def _patch_run(module: ModuleType) -> None:
    groups = module.init_process_groups

    def after(*args: Any, **options: Any) -> Any:
        reach("startup", at="before_groups")
        ranks = groups(*args, **options)
        reach("startup", at="groups")
        return ranks

    module.init_process_groups = after  # type: ignore[attr-defined]


def _patch_materialise(module: ModuleType) -> None:
    def begin(materialiser: Any, job: Any) -> None:
        reach("worker", job.step, purpose=job.purpose)

    def decode(materialiser: Any, raw: Any, ref: Any, step: int) -> None:
        reach("decode", step, key=raw.origin.key, source=raw.origin.source)

    _before(module.Materialiser, "__call__", begin)
    _before(module.Materialiser, "_materialise", decode)


def _patch_publish(module: ModuleType) -> None:
    reached = module.publish_directory

    def publish(target: Path, write: Callable[[Path], None]) -> None:
        def told(fresh: Path) -> None:
            name = target.name.rpartition("-")[2]
            reach("writing", int(name) if name.isdigit() else None, target=target.name)
            write(fresh)

        reached(target, told)

    module.publish_directory = publish  # type: ignore[attr-defined]


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "vlm_dist.trainer": _patch_trainer,
    "vlm_dist.data.feed": _patch_feed,
    "vlm_dist.engine.engine": _patch_engine,
    "vlm_dist.evaluate": _patch_evaluate,
    "vlm_dist.build.run": _patch_run,
    "vlm_dist.data.materialise": _patch_materialise,
    "vlm_dist.checkpoint.store": _patch_publish,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the patches follow the import of the modules that they are for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def then_patch(module: ModuleType) -> None:
            run(module)
            PATCHES[name](module)

        spec.loader.exec_module = then_patch  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Make the points in this process: now, where their modules are there, else when they come."""
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
