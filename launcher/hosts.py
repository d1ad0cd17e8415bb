"""Hosts that are reached by ssh: the hostfile, and what DeepSpeed's runner has to be told for them.

The runner starts `python -m deepspeed.launcher.launch` on every host through pdsh and a shell there. That shell has
the environment of a login without a terminal, and reads the command line once more.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.config.masking import is_secret_name
from vlm_dist.errors import ConfigError

#: Variables that the ranks need as they are here. The runner itself passes on PYTHON*, UCX*, MV2*, MLFLOW*, and NCCL*
#: where there are GPUs.
EXPORTED_PREFIXES = (
    "DS_ACCELERATOR",
    "GLOO_",
    "HF_",
    "LD_LIBRARY_PATH",
    "NCCL_",
    "OMP_NUM_THREADS",
    "PATH",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "VLM_DIST_",
    "WANDB_",
)
_LOGIN_SECONDS = 10
_MAX_LOGINS = 64
_OWN_FILES = (Path("~/.deepspeed_env"), Path(".deepspeed_env"))


@dataclass(frozen=True)
class ExportFile:
    """What the runner exports on every host.

    Attributes:
        text: NAME=value lines.
        notices: what was left out.
    """

    text: str
    notices: tuple[str, ...]


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> number of processes, in the order of the file.

    Raises:
        ConfigError: with every line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*(\S+)\s+slots=(\d+)\s*(#.*)?", line)
        if match is None or int(match[2]) < 1:
            problems.append(f"{path}:{number}: got {line.strip()!r}, expected a form like: gpu01 slots=8")
        elif match[1] in hosts:
            problems.append(f"{path}:{number}: {match[1]} is there twice")
        else:
            hosts[match[1]] = int(match[2])
    if not hosts and not problems:
        problems.append(f"{path}: is empty, expected lines like: gpu01 slots=8")
    if problems:
        raise ConfigError("\n".join(problems))
    return hosts


def check_reachable(hosts: Sequence[str]) -> None:
    """Log in to every host once, all at the same time, as the runner will.

    It looks at the first host alone; one that is missing later leaves the ranks of the others waiting for minutes.

    Raises:
        ConfigError: with every host that does not answer, and what ssh says.
    """
    if not hosts:
        return
    with ThreadPoolExecutor(min(len(hosts), _MAX_LOGINS)) as threads:
        problems = [problem for problem in threads.map(_log_in, hosts) if problem is not None]
    if problems:
        raise ConfigError(
            "cannot log in by ssh, which has to work without a password:\n  "
            + "\n  ".join(problems)
            + "\ntry it by hand, or take the host out of the hostfile"
        )


def _log_in(host: str) -> str | None:
    """What is wrong with a host; None: nothing."""
    options = ["-o", "BatchMode=yes", "-o", "PasswordAuthentication=no", "-o", f"ConnectTimeout={_LOGIN_SECONDS}"]
    try:
        done = subprocess.run(  # noqa: S603
            ["ssh", *options, host, "true"],  # noqa: S607 - wherever this machine has it
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=3 * _LOGIN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"{host}: no answer for {3 * _LOGIN_SECONDS} s"
    said = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else f"{host}: {said[-1] if said else f'exit code {done.returncode}'}"


def make_export_file(environ: Mapping[str, str], own_files: Sequence[Path] = _OWN_FILES) -> ExportFile:
    """Our variables, then the user's own `.deepspeed_env` files, which win.

    Args:
        environ: of this process.
        own_files: which DeepSpeed would have read.
    """
    lines, notices = [], []
    for name in sorted(environ):
        if not name.startswith(EXPORTED_PREFIXES):
            continue
        if is_secret_name(name):  # everybody on the hosts can read command lines, which it would be part of
            notices.append(
                f"{name} is not passed to the hosts, where everybody could read it in the list of processes; log in "
                "there once (hf auth login, wandb login)"
            )
        elif "\n" in environ[name]:
            notices.append(f"{name} is not passed to the hosts: it has several lines")
        else:
            # the runner puts double quotes around what it does not know, and changes nothing inside them
            lines.append(f"{name}={escape_for_double_quotes(environ[name])}")
    for path in own_files:
        path = path.expanduser()
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue  # the runner's parser fails at such lines
            if "=" in line:
                lines.append(line.strip())
            else:
                notices.append(f"{path}:{number}: left out, expected NAME=value")
    return ExportFile("".join(f"{line}\n" for line in lines), tuple(notices))


def escape_for_double_quotes(text: str) -> str:
    """A text that the shell reads as it is, once somebody has put double quotes around it."""
    return re.sub(r'([\\"$`])', r"\\\1", text)


def quote_for_hosts(arguments: Sequence[str]) -> list[str]:
    r"""Arguments that arrive unchanged behind the shell of a host.

    The runner puts double quotes around those that have a space, and a backslash before each double quote in them; the
    others it leaves to the shell.
    """
    return [
        re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument) for argument in arguments
    ]
