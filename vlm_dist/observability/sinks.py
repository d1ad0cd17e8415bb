"""What the log needs of a service that figures are sent to, and the names that figures have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """A service of `report_to`, on rank 0. Nothing here raises: one that fails says so once and falls silent."""

    def start(self, start_step: int) -> str:
        """Begin or continue the record of a run.

        Args:
            start_step: optimizer updates that are done; 0 begins a new record.

        Returns:
            A line that says where the figures go.
        """

    def write(self, group: str, step: int, record: Mapping[str, Any]) -> None:
        """Log figures under `group/`."""

    def write_predictions(self, step: int, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any | None]) -> None:
        """Show some generated answers of an evaluation.

        Args:
            step: optimizer updates that are done.
            rows: an answer each.
            pictures: of the same samples, small, for Pillow; None where there is none.
        """

    def write_adapter(self, directory: Path, files: Sequence[str], step: int, aliases: Sequence[str]) -> None:
        """Keep the files of an adapter, where the service keeps files."""

    def close(self, exit_code: int) -> str | None:
        """Send what is left.

        Returns:
            A line for the user, where there is something to say.
        """


def under_group(group: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """`loss` of an evaluation becomes `eval/loss`, `null_slots/decode` of steps `train/null_slots/decode`."""
    return {
        f"{group}/{name.removeprefix(f'{group}_').removeprefix(f'{group}/')}": value
        for name, value in record.items()
        if value is not None and name != "step"
    }
