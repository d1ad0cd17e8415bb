"""Packages: installed, in the ranges that this project is tested with, and able to be imported together."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata

from vlm_dist.observability.findings import Finding, Level

_PROJECT = "vlm-dist"
#: Compiled packages whose wheels have to fit torch's: what is installed may still not load.
_COMPILED = ("torchvision", "decord")


def check_packages() -> Iterator[Finding]:
    """Compare what is installed with what this project asks for."""
    from packaging.requirements import Requirement

    wrong = 0
    told = []
    for line in metadata.requires(_PROJECT) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong += 1
            yield Finding(
                Level.PROBLEM, f"package {requirement.name}", "not installed", f"pip install '{requirement.name}'"
            )
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            yield Finding(
                Level.WARNING,
                f"package {requirement.name}",
                f"{version}, outside of {requirement.specifier}, which this project is tested with",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        if requirement.name in ("torch", "transformers", "peft", "deepspeed"):
            told.append(f"{requirement.name} {version}")
    for name in _COMPILED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            wrong += 1
            first = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(
                Level.PROBLEM,
                f"package {name}",
                f"it is installed, but does not load: {first}",
                f"install the {name} that belongs to this torch and this machine",
            )
    if not wrong:
        yield Finding(Level.OK, "packages", ", ".join(told))
