"""Which Python the GPU targets run: `python3 -m tests.gpu.environment` prints its path, and makes it if need be.

`.venv` of `make setup`, if there is one. Else `.gpu/venv`, made without a network: of a Python that has PyTorch, and of
the wheels in `.gpu/wheels`. This module needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu"
#: What the GPU targets cannot do without.
IMPORTS = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "deepspeed", "datasets", "decord", "webdataset"),
    *(
        "pydantic",
        "safetensors",
        "pyarrow",
        "yaml",
        "jinja2",
        "rich",
        "psutil",
        "torchmetrics",
        "cv2",
        "sklearn",
        "pytest",
    ),
)
#: Commands of this project, and where they are (`[project.scripts]`).
COMMANDS = {"deepspeed": "launcher.deepspeed_cli", "vlm-dist": "vlm_dist.cli"}


class EnvironmentMissingError(Exception):
    """There is none, and none can be made."""


def find(root: Path = ROOT) -> Path:
    """The interpreter to use; made first where there is none.

    Args:
        root: of the project.

    Raises:
        EnvironmentMissingError: there is no PyTorch, or no wheels, or what was made cannot import what is needed.
    """
    own = root / ".venv" / "bin" / "python"
    if own.exists():
        return own
    wheels = sorted((root / ".gpu" / "wheels").glob("*.whl"))
    if not wheels:
        raise EnvironmentMissingError(
            "neither .venv nor .gpu/wheels is there: run `make setup` (with a network), or `make gpu-wheels` elsewhere "
            "and bring .gpu/wheels"
        )
    return make(root / ".gpu" / "venv", find_base(), wheels, root)


def find_base() -> Path:
    """A Python that has PyTorch: this one, or the first `python3` or `python` on the path.

    Raises:
        EnvironmentMissingError: none has.
    """
    named = os.environ.get("PYTHON")
    candidates = [named and shutil.which(named), sys.executable, shutil.which("python3"), shutil.which("python")]
    for candidate in dict.fromkeys(filter(None, candidates)):
        code = "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)"
        if subprocess.run([candidate, "-c", code], capture_output=True).returncode == 0:
            return Path(candidate)
    raise EnvironmentMissingError("no Python with PyTorch is on the path: set PYTHON=/path/to/python")


def make(target: Path, base: Path, wheels: list[Path], root: Path = ROOT) -> Path:
    """Make an environment of another one's packages and of wheels, which come first; once for the same ones.

    Args:
        target: where.
        base: an interpreter, maybe of a virtual environment: its packages are seen, which `--system-site-packages`
            alone would not do, as that gives the packages of the Python below.
        wheels: to install, all their dependencies among them or there.
        root: of the project, which is seen, too.

    Returns:
        Its interpreter.

    Raises:
        EnvironmentMissingError: something of `IMPORTS` is missing.
    """
    stamp = target / "made"
    identity = hashlib.sha256("\n".join([str(base), str(root), *(wheel.name for wheel in wheels)]).encode()).hexdigest()
    python = target / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == identity:
        return python
    shutil.rmtree(target, ignore_errors=True)
    _run([str(base), "-m", "venv", "--without-pip", "--system-site-packages", str(target)])
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    install = [
        str(base),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
    ]
    _run([*install, "--target", str(site), *map(str, wheels)])
    code = "import sysconfig; print(sysconfig.get_path('purelib')); print(sysconfig.get_path('platlib'))"
    seen = dict.fromkeys([str(root), *_run([str(base), "-c", code]).split("\n")])
    (site / "zz_below.pth").write_text("\n".join(filter(None, seen)) + "\n")
    for command, module in COMMANDS.items():
        script = target / "bin" / command
        script.write_text(f"#!{python}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)
    _check(python)
    stamp.write_text(identity)
    return python


def _check(python: Path) -> None:
    code = (
        "import importlib.util as u, sys\n"
        f"missing = [name for name in {IMPORTS!r} if u.find_spec(name) is None]\n"
        "print(', '.join(missing))"
    )
    missing = _run([str(python), "-c", code]).strip()
    if missing:
        raise EnvironmentMissingError(f"{python} lacks {missing}: add wheels of them to tests/gpu/wheels.txt")


def _run(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise EnvironmentMissingError(f"{' '.join(command)}:\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def main() -> int:
    """Print the interpreter's path."""
    try:
        print(find())
    except EnvironmentMissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
