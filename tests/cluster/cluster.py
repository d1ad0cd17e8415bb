"""A Slurm and ssh cluster that a test starts, in Python: `cluster.sh` does the work."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.tiny_run import Finished

SCRIPT = Path(__file__).parent / "cluster.sh"
PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "munged",
    "sshd",
    "ssh-keygen",
    "pdsh",
    "ip",
    "unshare",
    "nsenter",
    "pgrep",
)

#: States of a job that has come to its end.
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})

_numbers = itertools.count()


def why_not() -> str | None:
    """Why a cluster cannot be started here; None: it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed (.ci/run lists the Debian packages)"
    if os.geteuid() != 0:
        return "not root, who alone may make network namespaces"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Process:
    """A process inside a node."""

    pid: int  # as the node counts
    command: str


class Cluster:
    """A running cluster.

    Attributes:
        nodes: their names.
        directory: of its settings and logs.
    """

    def __init__(self, directory: Path, prefix: str, num_nodes: int) -> None:
        self.directory = directory
        self.nodes = [f"{prefix}{number}" for number in range(1, num_nodes + 1)]
        # it ends with the test run, however that ends
        self._settings = {"CLUSTER_ROOT": str(directory), "CLUSTER_PREFIX": prefix, "CLUSTER_OWNER": str(os.getpid())}

    @property
    def hostfile(self) -> Path:
        """Every node with two slots."""
        return self.directory / "hostfile"

    def manage(self, *words: str, timeout_seconds: float = 60) -> Finished:
        """A command of cluster.sh, such as `kill node1`."""
        return self._run([str(SCRIPT), *words], os.environ, None, timeout_seconds)

    def login(
        self,
        *command: str,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_seconds: float = 60,
    ) -> Finished:
        """Run a command on the controller, as on a login node."""
        return self._run([str(SCRIPT), "ctl", *command], environ or os.environ, cwd, timeout_seconds)

    def on(
        self,
        node: str,
        *command: str,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_seconds: float = 60,
    ) -> Finished:
        """Run a command in a node."""
        return self._run([str(SCRIPT), "on", node, *command], environ or os.environ, cwd, timeout_seconds)

    def begin(
        self, node: str, *command: str, environ: Mapping[str, str], cwd: Path, output: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command in a node, and leave it running; what it says goes to a file."""
        with output.open("wb") as file:
            return subprocess.Popen(
                [str(SCRIPT), "on", node, *command],
                env={**environ, **self._settings},
                cwd=cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def _run(
        self, command: Sequence[str], environ: Mapping[str, str], cwd: Path | None, timeout_seconds: float
    ) -> Finished:
        ended = subprocess.run(
            command,
            env={**environ, **self._settings},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        return Finished(ended.returncode, ended.stdout, ended.stderr)

    def submit(self, script: Path, *arguments: str, cwd: Path, environ: Mapping[str, str]) -> Job:
        """`sbatch script arguments`, as a user types it in her directory."""
        done = self.login("sbatch", str(script), *arguments, cwd=cwd, environ=environ)
        number = re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)
        assert number, done.output
        return Job(self, number[1])

    def node_state(self, node: str) -> str:
        """As sinfo says it, such as idle, alloc, down*."""
        return self.login("sinfo", "-h", "-n", node, "-o", "%t").stdout.strip()

    def wait_for_node(self, node: str, state: str, seconds: float = 60) -> None:
        """Until a node's state begins so."""
        deadline = time.monotonic() + seconds
        while not self.node_state(node).startswith(state):
            assert time.monotonic() < deadline, f"{node} is {self.node_state(node)}, not {state}"
            time.sleep(0.3)

    def processes(self, node: str, containing: str) -> list[Process]:
        """Living processes of a node whose command line has that text."""
        listed = self.on(node, "ps", "-e", "-ww", "-o", "pid=,stat=,args=")
        assert listed.exit_code == 0, listed.output
        found = []
        for line in listed.stdout.splitlines():
            pid, state, command = line.split(None, 2)
            if containing in command and not state.startswith("Z"):
                found.append(Process(int(pid), command))
        return found

    def orphans(self, nodes: Sequence[str] | None = None, seconds: float = 10) -> dict[str, list[str]]:
        """What is left of training on nodes (None: all) that are up, after so long a time to end; empty: nothing."""
        deadline = time.monotonic() + seconds
        while True:
            left = {}
            for node in self.nodes if nodes is None else nodes:
                if not (self.directory / "run" / f"{node}.pid").exists():
                    continue
                here = [
                    p.command for word in ("vlm_dist", "slurm_script", "launcher.") for p in self.processes(node, word)
                ]
                if here:
                    left[node] = here
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)


class Job:
    """A batch job.

    Attributes:
        number: Slurm's id of it.
    """

    def __init__(self, cluster: Cluster, number: str) -> None:
        self._cluster = cluster
        self.number = number

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts, ExitCode, StdOut."""
        shown = self._cluster.login("scontrol", "-o", "show", "job", self.number)
        assert shown.exit_code == 0, shown.output
        return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)

    @property
    def state(self) -> str:
        """Such as PENDING, RUNNING, COMPLETED."""
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        """Lives before the present one."""
        return int(self.facts()["Restarts"])

    @property
    def output(self) -> str:
        """Of all its lives, as far as they wrote."""
        path = Path(self.facts()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, seconds: float = 120) -> str:
        """Until it has ended.

        Returns:
            Its state.
        """
        deadline = time.monotonic() + seconds
        # sbatch --wait and scontrol wait_job look every ten seconds only
        while (state := self.state) not in ENDED:
            assert time.monotonic() < deadline, f"job {self.number} is {state} after {seconds} s:\n{self.output}"
            time.sleep(0.3)
        return state

    def wait_for(self, text: str, seconds: float = 90, *, count: int = 1) -> None:
        """Until its output has a text that often; it must not end before."""
        deadline = time.monotonic() + seconds
        while self.output.count(text) < count:
            state = self.state
            assert state not in ENDED or self.output.count(text) >= count, f"{state}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} after {seconds} s ({state}):\n{self.output}"
            time.sleep(0.2)

    def cancel(self, *options: str) -> None:
        """`scancel`, with options such as --signal=USR1."""
        done = self._cluster.login("scancel", *options, self.number)
        assert done.exit_code == 0, done.output


@contextmanager
def running_cluster(num_nodes: int) -> Iterator[Cluster]:
    """Start a cluster that no other test run meets, and end it."""
    prefix = f"v{os.getpid()}n{next(_numbers)}x"
    # not pytest's directory: the path of a Unix socket has at most 107 characters
    directory = Path(tempfile.mkdtemp(prefix="vlm-dist-cluster-"))
    cluster = Cluster(directory, prefix, num_nodes)
    try:
        started = cluster.manage("start", str(num_nodes))
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted((directory / "log").glob("*")))
        assert started.exit_code == 0, f"{started.output}\n{logs}"
        yield cluster
    finally:
        cluster.manage("stop")
        shutil.rmtree(directory, ignore_errors=True)
