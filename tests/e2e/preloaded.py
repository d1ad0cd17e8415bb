"""The trainer's command line without its ten seconds of imports: a process that has them forks once per command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.tiny_run import ROOT, Finished

#: Set by launchers: what the tests themselves run under must not be taken for one.
_FOREIGN = ("SLURM", "WANDB", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_")


def clean_environment() -> dict[str, str]:
    """The environment of a user who has a virtual environment, and nothing else of ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    return environment


class Preloaded:
    """Runs `vlm_dist.train.main` or `vlm_dist.cli.main` in a fresh fork per command."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self,
        entry: str,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 60,
    ) -> Finished:
        """Run one command to its end.

        Args:
            entry: module whose `main` is called: vlm_dist.train or vlm_dist.cli.
            arguments: of the command line.
            directory: to work in.
            environment: variables to add.
            timeout_seconds: after which it is killed, with exit code -9.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = [entry, list(arguments), str(directory), dict(environment or {}), timeout_seconds]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the preloaded process has ended: {self._process.poll()}"
        return Finished(*json.loads(line))


@contextmanager
def preloaded() -> Iterator[Preloaded]:
    """Start the process, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.preloaded"],
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Preloaded(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vlm_dist.build
    import vlm_dist.cli
    import vlm_dist.train  # noqa: F401 - what every command needs

    for line in sys.stdin:
        entry, arguments, directory, environment, timeout_seconds = json.loads(line)
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            child = os.fork()
            if child == 0:
                _run(entry, arguments, directory, environment, stdout.fileno(), stderr.fileno())
            code = _wait(child, timeout_seconds)
            stdout.seek(0)
            stderr.seek(0)
            answers.write(json.dumps([code, stdout.read(), stderr.read()]) + "\n")
        answers.flush()


def _wait(child: int, timeout_seconds: float) -> int:
    deadline = time.monotonic() + timeout_seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _run(entry: str, arguments: list[str], directory: str, environment: dict[str, str], out: int, err: int) -> None:
    """In the child: become the command."""
    import runpy

    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(directory)
    os.environ.update(environment)
    sys.argv = [entry, *arguments]
    code: object = 1
    try:
        sys.modules.pop(entry)
        runpy.run_module(entry, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
