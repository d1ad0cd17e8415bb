"""Errors that a user can act on, and the exit codes that a scheduler can act on.

Every error that bad input can cause derives from `VlmDistError`: its message is one clear statement of
what is wrong, where, and how to fix it. The entries print it without a traceback and exit with its code.
Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells the launcher and the scheduler."""

    DONE = 0
    FAILURE = 1
    CONFIG = 2  # never requeue: it would fail again
    DATA = 3
    MODEL = 4
    CHECKPOINT = 5
    DISTRIBUTED = 6
    DIVERGED = 7  # never requeue: the weights are not worth it
    HANG = 70  # EX_SOFTWARE
    PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint was written, requeue


class VlmDistError(Exception):
    """Base of all errors with a user-facing message."""

    exit_code: ExitCode = ExitCode.FAILURE


class ConfigError(VlmDistError):
    """A value in a YAML file, a DeepSpeed JSON or on the command line is wrong.

    The message may have several lines: one per problem, all found at once.
    """

    exit_code = ExitCode.CONFIG


class DataError(VlmDistError):
    """A source, shard or index cannot be used; not about a single sample (see `SkipSample`)."""

    exit_code = ExitCode.DATA


class ModelError(VlmDistError):
    """A model, processor or adapter cannot be found, loaded or used as configured."""

    exit_code = ExitCode.MODEL


class CheckpointError(VlmDistError):
    """A checkpoint is missing, incomplete, damaged or does not fit the run."""

    exit_code = ExitCode.CHECKPOINT


class DistributedError(VlmDistError):
    """The process environment is inconsistent, or ranks disagree where they must not."""

    exit_code = ExitCode.DISTRIBUTED


class DivergedError(VlmDistError):
    """The gradient is not finite, and the run is not to go on; a checkpoint of the last good state was written."""

    exit_code = ExitCode.DIVERGED


class SkipSample(Exception):  # noqa: N818 - a signal to the materialiser, never shown as an error
    """One sample cannot be used; its slot becomes a null slot of loss weight 0.

    Args:
        null_class: one of `vlm_dist.data.types.NULL_CLASSES`.
        message: what was wrong with it, for the quarantine file.
    """

    def __init__(self, null_class: str, message: str) -> None:
        super().__init__(message)
        self.null_class = null_class
        self.message = message


def printable(text: str) -> str:
    """A text from outside, such as a path, as any terminal or log file can show it: half a character has no bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
