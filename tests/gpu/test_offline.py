"""What travels to a machine without a network is enough there: checked without such a machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.gpu import carried, environment

# not `find_spec("pip")`: setuptools takes a look for pip as a sign to leave `distutils` alone, for all of the process
HAS_PIP = any(distributions(name="pip"))
needs_pip = pytest.mark.skipif(not HAS_PIP, reason="this environment was itself made of wheels")


def make_wheel(folder: Path, name: str, version: str, *requirements: str) -> Path:
    """A pure wheel with one module that tells its version."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {line}" for line in requirements]
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return path


def test_the_pins_are_those_of_the_constraints() -> None:
    """Whatever CI has, the GPU machine has; what CI has not is pinned here alone."""
    of_ci = dict(read_pins(carried.ROOT / "constraints.txt"))
    pins = dict(read_pins(carried.ROOT / "tests" / "gpu" / "wheels.txt"))
    assert pins and {name: of_ci[name] for name in pins if name in of_ci} == {
        n: v for n, v in pins.items() if n in of_ci
    }
    assert set(pins) - set(of_ci) == {"liger-kernel", "trl"}


def read_pins(path: Path) -> list[tuple[str, str]]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return [(carried.canonicalize_name(name), version) for name, version in pairs]


def test_what_wheels_leave_to_the_machine_is_told(tmp_path: Path) -> None:
    paths = [
        make_wheel(
            tmp_path, "outer", "1.0", "inner>=2", "torch>=2.11", "colorama; sys_platform == 'win32'", "x; extra == 'y'"
        ),
        make_wheel(tmp_path, "inner", "2.5"),
    ]
    wheels = [carried.read_wheel(path) for path in paths]
    assert carried.needed_there(wheels) == {"torch": ["outer (>=2.11)"]}
    assert carried.needed_there(wheels, [carried.Requirement("inner")]) == {"torch": ["outer (>=2.11)"]}
    old = carried.read_wheel(make_wheel(tmp_path, "inner", "1.9"))
    with pytest.raises(ValueError, match=r"outer asks for inner>=2, and 1\.9 is carried"):
        carried.needed_there([wheels[0], old])


def test_needs_of_another_python_are_told_too(tmp_path: Path) -> None:
    wheel = carried.read_wheel(make_wheel(tmp_path, "one", "1.0", "new; python_version >= '3.12'"))
    assert carried.needed_there([wheel]) == {"new": ["one"]}


@needs_pip
def test_an_environment_of_wheels_comes_before_the_one_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the GPU machine: the Python with PyTorch is itself in a virtual environment."""
    monkeypatch.setattr(environment, "IMPORTS", ("torch", "carried_thing", "vlm_dist"))
    wheels = [make_wheel(tmp_path, "carried_thing", "3.0"), make_wheel(tmp_path, "hjson", "99.0")]
    python = environment.make(tmp_path / "venv", Path(sys.executable), wheels)
    code = (
        "import carried_thing, hjson, importlib.util, importlib.metadata as m; "
        "print(carried_thing.VERSION, hjson.VERSION, m.version('hjson'), importlib.util.find_spec('torch').origin)"
    )
    told = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.startswith("3.0 99.0 99.0 "), told.stderr
    assert "site-packages/torch" in told.stdout
    stamp = (tmp_path / "venv" / "made").stat().st_mtime_ns
    assert environment.make(tmp_path / "venv", Path(sys.executable), wheels) == python
    assert (tmp_path / "venv" / "made").stat().st_mtime_ns == stamp  # not made again
    script = tmp_path / "venv" / "bin" / "vlm-dist"
    told = subprocess.run([str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0 and "preview" in told.stdout, told.stderr


def test_without_wheels_it_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(environment.EnvironmentMissingError, match="run `make setup`"):
        environment.find(tmp_path)


@needs_pip
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "IMPORTS", ("torch", "not_there", "nor_this"))
    with pytest.raises(environment.EnvironmentMissingError, match="lacks not_there, nor_this: add wheels"):
        environment.make(tmp_path / "venv", Path(sys.executable), [make_wheel(tmp_path, "a_thing", "1.0")])
    assert not (tmp_path / "venv" / "made").exists()  # tried again the next time


def test_the_developers_environment_wins(tmp_path: Path) -> None:
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert environment.find(tmp_path) == own
