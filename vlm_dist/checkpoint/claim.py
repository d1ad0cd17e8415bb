"""Who saves in an output directory: the run that was started last. Another one that is still alive ends.

A job that was submitted twice, or a node that was cut off and still writes, would mix its checkpoints with the newer
run's. No lock is asked of the file system, which on network file systems is a matter of luck.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path

from vlm_dist.errors import CheckpointError

_NAME = ".saved-by.json"


class Claim:
    """One start's claim to a directory, made at once.

    Args:
        directory: created if missing.

    Raises:
        CheckpointError: it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _NAME
        self._token = secrets.token_hex(8)
        content = {"token": self._token, "host": socket.gethostname(), "process": os.getpid()}
        fresh = directory / f"{_NAME}.{self._token}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
            fresh.replace(self._path)
        except OSError as error:
            raise CheckpointError(f"{self._path} could not be written: {error}") from error

    def check(self) -> None:
        """See whether another start has made a claim since.

        Raises:
            CheckpointError: one has.
        """
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            token, who = found["token"], f"process {found['process']} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return  # somebody has tidied up: that is no other run
        if token != self._token:
            raise CheckpointError(
                f"{self._path.parent} was taken over by a run that was started later ({who}); this one ends, so that "
                "they do not mix their checkpoints. Give each run a train.output_dir of its own"
            )
