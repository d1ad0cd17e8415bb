"""The peers' environments: a virtual environment each under `.bench/env`, made when it is missing or its pins change.

    python -m tests.bench.data.environments

An environment holds the peer and what it needs, at the versions of `tests/bench/peers/<peer>.txt`. Behind it on the
path come the packages of the project's own environment: every loader meets the same torch, Pillow and transformers.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / ".bench" / "env"
PINS = ROOT / "tests" / "bench" / "peers"

#: Loader or trainer -> the environment that it runs in.
ENVIRONMENT_OF = {
    "webdataset": "webdataset",
    "webdataset_tuned": "webdataset",
    "energon": "energon",
    "streaming": "streaming",
    "hf_datasets": "datasets",
    "trl_sft": "trl",
    "llamafactory": "llamafactory",
    "ms_swift": "ms-swift",
}

#: Environment -> modules that are imported there without being used.
STAND_INS = {"llamafactory": ("torchaudio",)}
LOADERS = ("webdataset", "webdataset_tuned", "energon", "streaming", "hf_datasets")


def python_of(loader: str) -> Path:
    """Return the interpreter that a loader runs in; ours in the project's own."""
    name = ENVIRONMENT_OF.get(loader)
    return Path(sys.executable) if name is None else FOLDER / name / "bin" / "python"


def make_environments(of: Iterable[str] = LOADERS) -> None:
    """Make what is missing for these loaders or trainers."""
    for name in dict.fromkeys(ENVIRONMENT_OF[one] for one in of if one in ENVIRONMENT_OF):
        _make(name)


def _make(name: str) -> None:
    pins = PINS / f"{name}.txt"
    own = sysconfig.get_paths()["purelib"]
    wanted = hashlib.sha256(f"{own}\n{sys.version}\n{pins.read_text()}".encode()).hexdigest()
    folder = FOLDER / name
    stamp = folder / "made.txt"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"making the environment of {name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # the last on the path, so that the environment's own packages win
    (packages / "zz_project.pth").write_text(f"import site; site.addsitedir({own!r})\n")
    # the pins are complete; the resolver would install a second torch
    arguments = ["--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed", "-r", str(pins)]
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", *arguments], check=True)
    for module in STAND_INS.get(name, ()):
        (packages / f"{module}.py").write_text('"""Has no build for this torch; imported, and not used here."""\n')
    stamp.write_text(wanted)


if __name__ == "__main__":
    make_environments()
