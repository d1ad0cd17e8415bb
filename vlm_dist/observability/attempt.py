"""A service that fails must never end a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def attempt(what: str, action: Callable[[], Any]) -> bool:
    """Whether it worked; services raise many types, also from what they stand on."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - said, and training goes on
        reason = (str(error).splitlines() or ["no reason given"])[0]
        logger.warning("%s failed: %s: %s; training goes on", what, type(error).__name__, reason)
        return False
    return True
