"""Which `deepspeed` command an environment has after an installation; offline, with a stand-in for DeepSpeed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from launcher.entry_point_check import stock_deepspeed_notice

PROJECT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.e2e

# DeepSpeed installs its command as an old-style script, not as an entry point.
STAND_IN = {
    "setup.py": "from setuptools import setup\nsetup(name='deepspeed', version='0.19.8', scripts=['deepspeed'])\n",
    "deepspeed": "#!/usr/bin/env python\nfrom deepspeed.launcher.runner import main\nmain()\n",
}


@pytest.fixture
def sources(tmp_path):
    """Copies, as building leaves files in the source tree."""
    ours, stand_in = tmp_path / "vlm-dist", tmp_path / "deepspeed"
    ours.mkdir()
    for name in ("vlm_dist", "launcher"):
        shutil.copytree(PROJECT / name, ours / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, ours / name)
    stand_in.mkdir()
    for name, text in STAND_IN.items():
        (stand_in / name).write_text(text)
    return ours, stand_in


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_the_command_is_ours_until_deepspeed_is_installed_again(tmp_path, sources, editable):
    ours, stand_in = sources
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    commands = environment / "bin"
    # nothing but the build backend is lent to it, so that pip sees no other installation
    (site_packages,) = environment.glob("lib/python*/site-packages")
    lent = Path(setuptools.__file__).parents[1]
    for path in (*lent.glob("setuptools*"), lent / "_distutils_hack"):
        (site_packages / path.name).symlink_to(path)

    def install(*what):
        command = [sys.executable, "-m", "pip", "--python", str(commands / "python"), "install", "--quiet"]
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall"]
        subprocess.run([*command, *options, *what], check=True, timeout=120, cwd=tmp_path)

    install(str(stand_in))
    assert "--module" in (stock_deepspeed_notice(commands) or "")
    install(*(["-e"] if editable else []), str(ours))
    assert stock_deepspeed_notice(commands) is None
    install(str(stand_in))
    notice = stock_deepspeed_notice(commands)
    assert notice is not None
    assert "--no-deps" in notice
    install(*(["-e"] if editable else []), str(ours))  # the cure that the notice names
    assert stock_deepspeed_notice(commands) is None
