"""Weights & Biases, which may be absent, unreachable or slow, and must never stop or delay a training run.

Without an account (no API key) the run is recorded offline; so it is when the server does not answer. The run id is
kept in the output directory, so that a resumed run goes on in the same wandb run.
"""

from __future__ import annotations

import configparser
import json
import logging
import netrc
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from vlm_dist.config.masking import masked
from vlm_dist.observability.attempt import attempt
from vlm_dist.observability.sinks import under_group

logger = logging.getLogger(__name__)

RUN_FILE = "wandb_run.json"
INIT_TIMEOUT_SECONDS = 20.0
FINISH_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class WandbNames:
    """How a run is filed.

    Attributes:
        project: None for wandb's default (the environment variable WANDB_PROJECT).
        entity: team or user; None for the account's default.
        group: runs of one experiment share it.
        tags: by which runs are found.
        notes: what a person wants to remember.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None


class WandbSink:
    """One wandb run.

    Args:
        output_dir: holds `wandb_run.json` and wandb's own `wandb/` directory.
        names: how it is filed.
        run_name: None for one that wandb invents.
        config: shown with the run.
    """

    def __init__(self, output_dir: Path, *, names: WandbNames, run_name: str | None, config: Mapping[str, Any]) -> None:
        self._output_dir = output_dir
        self._names = names
        self._run_name = run_name
        self._config = config
        self._wandb: Any = None
        self._run: Any = None
        self._offline = False

    def start(self, start_step: int) -> str:
        """Begin or continue the run; takes seconds, at worst about `INIT_TIMEOUT_SECONDS`.

        Args:
            start_step: optimizer updates that are done; above 0 the run whose id is in the output directory goes on.

        Returns:
            A line that says where the figures go.
        """
        mode = wandb_mode(os.environ)
        if mode == "disabled":
            return "wandb: disabled by the environment"
        if not attempt("importing wandb", self._import):
            return "wandb: not used"
        run_id = self._read_run_id() if start_step > 0 else None
        if mode == "online" and not attempt("starting wandb online", lambda: self._init("online", run_id)):
            mode = "offline"
        if self._run is None and not attempt("starting wandb offline", lambda: self._init("offline", run_id)):
            return "wandb: not used"
        self._offline = mode == "offline"
        attempt("keeping the run id", self._write_run_id)
        if self._offline:
            return f"wandb: recording offline, in {self._output_dir / 'wandb'}"
        return f"wandb: {self._run.url}"

    def write(self, group: str, step: int, record: Mapping[str, Any]) -> None:
        """Log figures under `group/`. Of a step that was logged before the run was resumed, wandb keeps the first."""
        if self._run is None:
            return
        run, figures = self._run, under_group(group, record)
        if not attempt("logging to wandb", lambda: run.log(figures, step=step)):
            self._run = None

    def write_predictions(self, step: int, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any | None]) -> None:
        """See `Sink`: a table of pictures and strings, one of each evaluation."""
        if self._run is None:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))

        def log() -> None:
            data: list[list[Any]] = [[str(row.get(name)) for name in columns] for row in rows]
            if any(picture is not None for picture in pictures):
                columns.insert(0, "picture")
                shown = [None if picture is None else self._wandb.Image(picture) for picture in pictures]
                data = [[picture, *cells] for picture, cells in zip(shown, data, strict=True)]
            table = self._wandb.Table(columns=columns, data=data)
            self._run.log({"eval/predictions": table}, step=step)

        attempt("logging predictions to wandb", log)

    def write_adapter(self, directory: Path, files: Sequence[str], step: int, aliases: Sequence[str]) -> None:
        """See `Sink`: versions of one artifact. wandb copies the files now, and uploads them while training goes on."""
        if self._run is None:
            return
        run = self._run

        def log() -> None:
            name = re.sub(r"[^\w.-]+", "-", f"{run.name or run.id}-adapter")
            artifact = self._wandb.Artifact(name, type="model", metadata={"step": step})
            for file in files:
                artifact.add_file(str(directory / file))
            run.log_artifact(artifact, aliases=[*aliases, f"step-{step}"])

        attempt(f"keeping {directory} in wandb", log)

    def close(self, exit_code: int) -> str | None:
        """Upload what is left, for at most `FINISH_TIMEOUT_SECONDS`.

        Returns:
            A line that says how to upload an offline run, where there is one.
        """
        if self._run is None:
            return None
        run, self._run = self._run, None
        directory = Path(run.dir).parent
        if not attempt("finishing the wandb run", lambda: run.finish(exit_code=exit_code)):
            return None
        return f"wandb: upload with  wandb sync {directory}" if self._offline else None

    def _import(self) -> None:
        # its own telemetry waits for an answer when the process ends: 20 s where the server is silent
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # half a second: only where it is used

        self._wandb = wandb

    def _init(self, mode: Literal["online", "offline"], run_id: str | None) -> None:
        wandb = self._wandb
        wished: dict[str, Any] = {
            "init_timeout": INIT_TIMEOUT_SECONDS,
            "login_timeout": INIT_TIMEOUT_SECONDS,
            "finish_timeout": FINISH_TIMEOUT_SECONDS,
            "silent": True,  # its banners would tear the progress bar; start() and close() say what matters
            "console": "off",  # it replaces sys.stdout, as the progress bar does
            "disable_git": True,  # a remote's URL may carry a token
            "disable_code": True,
        }
        # a setting that this version of wandb does not know is an error there
        settings = wandb.Settings(**{k: v for k, v in wished.items() if k in wandb.Settings.model_fields})
        self._output_dir.mkdir(parents=True, exist_ok=True)
        with _masked_arguments():
            self._run = wandb.init(
                mode=mode,
                project=self._names.project,
                entity=self._names.entity,
                group=self._names.group,
                tags=self._names.tags or None,
                notes=self._names.notes,
                name=self._run_name,
                id=run_id,
                resume="allow" if run_id else None,
                dir=str(self._output_dir),
                config=dict(self._config),
                settings=settings,
            )

    def _read_run_id(self) -> str | None:
        path = self._output_dir / RUN_FILE
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): a new wandb run is begun", path, error)
            return None

    def _write_run_id(self) -> None:
        path = self._output_dir / RUN_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"id": self._run.id}) + "\n", encoding="utf-8")
        temporary.replace(path)


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Within, `sys.argv` holds no secret: wandb stores the command line, and a `--set` may name a signed URL."""
    given = sys.argv
    sys.argv = [masked(argument) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def wandb_mode(environ: Mapping[str, str]) -> Literal["online", "offline", "disabled"]:
    """online, offline or disabled: what WANDB_MODE says, else online where there is an API key.

    Args:
        environ: usually `os.environ`.
    """
    if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    asked = environ.get("WANDB_MODE", "").lower()
    if asked == "disabled":
        return "disabled"
    if asked in ("offline", "dryrun"):
        return "offline"
    # never online without a key: wandb would ask for one on a terminal, and fail elsewhere
    return "online" if _has_credentials(environ) else "offline"


def _has_credentials(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environ.get("HOME") or Path.home())
    host = urlsplit(environ.get("WANDB_BASE_URL") or _stored_base_url(environ, home)).hostname or ""
    candidates = [Path(environ["NETRC"])] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in candidates:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue  # as good as no key
    return False


def _stored_base_url(environ: Mapping[str, str], home: Path) -> str:
    """What `wandb login --host` left behind, else the public server."""
    settings = configparser.ConfigParser(interpolation=None)
    path = Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings"
    try:
        settings.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError):
        settings.clear()
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")
