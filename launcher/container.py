"""How the ranks of a Slurm job get into a container: through apptainer, or through srun's own plugin (pyxis)."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.errors import ConfigError


@dataclass(frozen=True)
class Container:
    """What goes around the command of a rank.

    Attributes:
        srun_options: further options of srun.
        command: what stands before the rank's own command.
    """

    srun_options: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def find_container(environ: Mapping[str, str], project: Path) -> Container:
    """What the user's variables ask for.

    Args:
        environ: CONTAINER (an image of apptainer), PYXIS_IMAGE (of enroot), CONTAINER_MOUNTS (`/from[:/to[:ro]],…`),
            CONTAINER_OPTIONS (further ones, as a shell would read them).
        project: directory of the job; it is there in the container under the same name.

    Raises:
        ConfigError: both kinds are asked for, or what is asked for is not on this machine.
    """
    image, pyxis = environ.get("CONTAINER", ""), environ.get("PYXIS_IMAGE", "")
    mounts = [str(project), *(one for one in environ.get("CONTAINER_MOUNTS", "").split(",") if one.strip())]
    options = shlex.split(environ.get("CONTAINER_OPTIONS", ""))
    if image and pyxis:
        raise ConfigError(
            f"CONTAINER={image} and PYXIS_IMAGE={pyxis}: one kind of container at a time; empty the other"
        )
    if image:
        runner = shutil.which("apptainer") or shutil.which("singularity")
        if runner is None:
            raise ConfigError(
                f"CONTAINER={image} needs the command apptainer (or singularity), which is not on the PATH of this "
                "node; is it in a module (MODULES=…)?"
            )
        # images may also be docker://…, which apptainer fetches
        if "://" not in image and not Path(image).expanduser().exists():
            raise ConfigError(f"CONTAINER={image}: there is no such file on this node")
        gpu = [] if {"--nv", "--nvccli", "--rocm"} & set(options) else ["--nv"]
        binds = [part for mount in mounts for part in ("--bind", mount.strip())]
        return Container(command=(runner, "exec", *gpu, "--pwd", str(project), *binds, *options, image))
    if pyxis:
        if not _srun_has_pyxis():
            raise ConfigError(
                f"PYXIS_IMAGE={pyxis} needs srun with the pyxis plugin, which this cluster's does not have (`srun "
                "--help` names no --container-image); CONTAINER=image.sif goes through apptainer"
            )
        both = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in map(str.strip, mounts))
        return Container(
            srun_options=(
                f"--container-image={pyxis}",
                f"--container-mounts={both}",
                f"--container-workdir={project}",
                *options,
            )
        )
    if environ.get("CONTAINER_MOUNTS") or environ.get("CONTAINER_OPTIONS"):
        raise ConfigError("CONTAINER_MOUNTS and CONTAINER_OPTIONS need CONTAINER=image.sif or PYXIS_IMAGE=image")
    return Container()


def _srun_has_pyxis() -> bool:
    told = subprocess.run(["srun", "--help"], capture_output=True, text=True, check=False)  # noqa: S607
    return "--container-image" in told.stdout + told.stderr
