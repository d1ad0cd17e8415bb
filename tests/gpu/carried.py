"""What travels to a machine without a network, how large it is, and what it needs there (`make gpu-wheels`)."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu" / "wheels"
LIMIT_BYTES = 64 << 20  # of the tree and the wheels together
#: Of the machine that they are for.
PYTHON = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}


@dataclass(frozen=True)
class Wheel:
    """One wheel.

    Attributes:
        name: canonical.
        version: of it.
        num_bytes: of the file.
        requirements: that apply there.
    """

    name: str
    version: str
    num_bytes: int
    requirements: tuple[Requirement, ...]


def read_wheel(path: Path) -> Wheel:
    """What a wheel's METADATA says.

    Args:
        path: of the wheel.
    """
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        facts = email.message_from_bytes(archive.read(name))
    environment = {**{key: str(value) for key, value in default_environment().items()}, **PYTHON, "extra": ""}
    asked = [Requirement(line) for line in facts.get_all("Requires-Dist") or ()]
    applying = tuple(one for one in asked if one.marker is None or one.marker.evaluate(environment))
    return Wheel(canonicalize_name(facts["Name"]), facts["Version"], path.stat().st_size, applying)


def needed_there(wheels: Iterable[Wheel], own: Iterable[Requirement] = ()) -> dict[str, list[str]]:
    """What the wheels leave to the machine.

    Args:
        wheels: that travel.
        own: requirements of this project.

    Returns:
        Name -> who asks for it, and for which versions.

    Raises:
        ValueError: one wheel asks for another version of a second one.
    """
    carried = {wheel.name: wheel for wheel in wheels}
    found: dict[str, list[str]] = {}
    for asking, requirements in [*((w.name, w.requirements) for w in carried.values()), ("vlm-dist", tuple(own))]:
        for one in requirements:
            name = canonicalize_name(one.name)
            wheel = carried.get(name)
            if wheel is None:
                found.setdefault(name, []).append(f"{asking}{f' ({one.specifier})' if str(one.specifier) else ''}")
            elif not one.specifier.contains(wheel.version, prereleases=True):
                raise ValueError(
                    f"{asking} asks for {one}, and {wheel.version} is carried: correct tests/gpu/wheels.txt"
                )
    return dict(sorted(found.items()))


def own_requirements() -> list[Requirement]:
    """Of this project, without its extras."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"]]


def tree_bytes() -> int:
    """Of all files that git tracks or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = (ROOT / name for name in listed.split("\0") if name)
    return sum(path.lstat().st_size for path in paths if path.exists() or path.is_symlink())


def main() -> int:
    """Print what travels; the status is 1 where it is too much."""
    wheels = [read_wheel(path) for path in sorted(WHEELS.glob("*.whl"))]
    if not wheels:
        print(f"no wheels in {WHEELS}: run `make gpu-wheels` where there is a network")
        return 1
    for wheel in sorted(wheels, key=lambda one: -one.num_bytes):
        print(f"{wheel.num_bytes / 1e6:8.1f} MB  {wheel.name} {wheel.version}")
    tree, carried = tree_bytes(), sum(wheel.num_bytes for wheel in wheels)
    total = tree + carried
    print(f"{carried / 2**20:8.1f} MiB of wheels and {tree / 2**20:.1f} MiB of tree: {total / 2**20:.1f} of 64 MiB")
    print("The machine has to have:")
    for name, asking in needed_there(wheels, own_requirements()).items():
        print(f"  {name}: {', '.join(asking)}")
    return int(total > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
