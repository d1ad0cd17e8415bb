"""Python's logging: our own messages with the rank, libraries reduced to what a user should know."""

from __future__ import annotations

import logging
import sys

#: Chatty, and mostly the same on every rank: warnings from rank 0, errors from all.
LIBRARIES = (
    "DeepSpeed",
    "transformers",
    "peft",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "py.warnings",
)


class _CurrentStderr(logging.Handler):
    """Writes to the standard error of the moment, which the progress bar replaces while it is on."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # one write per record: several ranks often share one log file
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except OSError:
            self.handleError(record)


def show_messages(form: str) -> None:
    """Show warnings of all loggers on standard error, in this form; takes the place of an earlier call."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter(form))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _CurrentStderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)


def configure_logging(rank: int, world_size: int = 1) -> None:
    """Set up logging for this process; may be called again, also after libraries were imported.

    Args:
        rank: of this process; rank 0 also shows our informational messages.
        world_size: number of ranks; lines carry the rank where there are several.
    """
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    show_messages(f"{prefix}%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vlm_dist").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    if rank != 0 or not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # one bar per rank, and garbage in a log file
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
        # DeepSpeed and transformers bring handlers of their own: their lines would lack the rank and tear the bar
        library.handlers.clear()
        library.propagate = True
