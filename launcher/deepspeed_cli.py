"""The `deepspeed` command of this project: DeepSpeed's own runner, which also takes `-m` for `--module`.

    deepspeed --num_gpus 8 -m vlm_dist.train --config configs/demo.yaml

`python -m`, `torchrun -m` and `accelerate launch -m` all spell it that way; DeepSpeed's parser knows `--module` only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, ClassVar

from launcher.lifeline import STOP_SIGNALS, end_with_parent

#: Options of DeepSpeed's runner that take a value as the next argument (deepspeed.launcher.runner.parse_args).
#: Needed to find the user's script, after which nothing may be touched; a test compares them with the installed runner.
OPTIONS_WITH_VALUE = frozenset(
    {
        "-H",
        "--hostfile",
        "-i",
        "--include",
        "-e",
        "--exclude",
        "--num_nodes",
        "--num_gpus",
        "--num_accelerators",
        "--master_port",
        "--master_addr",
        "--node_rank",
        "--launcher",
        "--launcher_args",
        "--enable_each_rank_log",
        "--autotuning",
        "--bind_core_list",
        "--ssh_port",
        "--venv_script",
        "--log_level",
    }
)


def rewrite_module_option(arguments: Sequence[str]) -> list[str]:
    """Turn `-m` into `--module` where it is an option of the runner.

    Args:
        arguments: of the command, without its name.

    Returns:
        The arguments for DeepSpeed's runner; everything from the user's script on is as it was.
    """
    rewritten: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "-m":
            rewritten.append("--module")
        elif argument.startswith("-m") and not argument.startswith("--"):
            # `-mvlm_dist.train`, as Python's own -m allows
            return [*rewritten, "--module", argument[2:], *arguments[position + 1 :]]
        elif _takes_value(argument):
            rewritten += arguments[position : position + 2]
            position += 1
        elif argument.startswith("-") and argument != "--":
            rewritten.append(argument)
        else:
            return [*rewritten, *arguments[position:]]
        position += 1
    return rewritten


def _takes_value(argument: str) -> bool:
    # the runner's parser accepts beginnings of long options, too
    is_beginning = argument.startswith("--") and len(argument) > 2
    return argument in OPTIONS_WITH_VALUE or (is_beginning and any(o.startswith(argument) for o in OPTIONS_WITH_VALUE))


class _RecordedPopen(subprocess.Popen[Any]):
    """Remembers what the runner starts, as the runner itself reports a child that a signal killed as a success."""

    started: ClassVar[list[_RecordedPopen]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.environment: dict[str, str] | None = kwargs.get("env")
        # the runner's own end, SIGTERM included, would leave all ranks behind: so what it starts is asked to stop then
        kwargs.setdefault("preexec_fn", functools.partial(end_with_parent, signal.SIGTERM, os.getpid()))
        super().__init__(*args, **kwargs)
        self.started.append(self)

    def wait(self, timeout: float | None = None) -> int:
        """Wait, as the runner does after it has set its own handlers."""
        if hosts_command(self.args, signal.SIGTERM) is not None:
            for number in STOP_SIGNALS:
                signal.signal(number, _ask_hosts)
        return super().wait(timeout)


def _is_request(process: subprocess.Popen[Any]) -> bool:
    return any("pgrep -f" in str(word) for word in _words(process))


def _words(process: subprocess.Popen[Any]) -> list[Any]:
    return process.args if isinstance(process.args, list) else []


def hosts_command(started: Any, number: int) -> list[str] | None:
    """What hands a signal to the ranks of a run on its hosts.

    In its place the runner would end pdsh and have every host do `pkill -f "python -u -m deepspeed.launcher.launch"`:
    all runs there that this Python has started, and the exit codes are lost.

    Args:
        started: command of a process; that of the runner's pdsh begins with `pdsh -S -f 1024 -w HOSTS`.
        number: the signal.

    Returns:
        The command; None: the process is something else.
    """
    words = [str(word) for word in started] if isinstance(started, list) else []
    port = next((word for word in words if word.startswith("--master_port=")), None)
    if words[:1] != ["pdsh"] or port is None:
        return None
    # from its beginning: the shells in between have the same words in their command lines
    launch = f"^[^ ]+ -u -m deepspeed.launcher.launch .*{port}( |$)"
    name = signal.Signals(number).name.removeprefix("SIG")
    return [*words[: words.index("-w") + 2], f"pgrep -f '{launch}' | xargs -r -n1 pkill -{name} -P"]


def _ask_hosts(number: int, frame: FrameType | None) -> None:
    """Hand a request to stop to the ranks of all hosts, and go on waiting for them."""
    for process in list(_RecordedPopen.started):
        command = hosts_command(process.args, number)
        if command is not None and process.poll() is None:
            # not in our session: a second Ctrl-C is not for it
            _RecordedPopen(command, env=process.environment, start_new_session=True, preexec_fn=None)


def _ask_ranks(number: int, frame: FrameType | None) -> None:
    """Hand a request to stop to the ranks of this machine, each once: they save, and end with their own exit code.

    DeepSpeed's launcher, which starts them, would end with 1 and leave each 30 s.
    """
    import psutil

    for process in _RecordedPopen.started:
        if "deepspeed.launcher.launch" not in _words(process) or process.poll() is not None:
            continue
        try:
            ranks = psutil.Process(process.pid).children()
        except psutil.Error:
            continue
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
        if not ranks:  # it has not got as far as that
            process.terminate()


def _listen() -> None:
    """Have requests to stop go to the ranks of this machine; over ssh `_ask_hosts` takes the place of this."""
    signal.signal(signal.SIGTERM, _ask_ranks)
    signal.signal(signal.SIGUSR1, _ask_ranks)
    if os.getsid(0) == os.getpid():  # no terminal, whose Ctrl-C the ranks would get from there
        signal.signal(signal.SIGINT, _ask_ranks)


def main() -> None:
    """Entry point of the console script; exits with the code of the first rank that failed."""
    arguments = rewrite_module_option(sys.argv[1:])
    from deepspeed.launcher import runner  # seconds: only when something is launched

    subprocess.Popen = _RecordedPopen  # type: ignore[misc]
    _listen()
    runner.main(arguments)
    runs = [process for process in _RecordedPopen.started if not _is_request(process)]
    killed = [-process.returncode for process in runs if (process.returncode or 0) < 0]
    if killed:
        sys.exit(128 + killed[0])  # the shell's way to say "ended by this signal"


if __name__ == "__main__":
    main()
