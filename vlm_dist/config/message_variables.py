"""`{variable}` in the texts of `message_format`: what it means, in one place for checking and for rendering.

A name in single braces is a variable; in double braces it is that text itself (`{{name}}` -> `{name}`). Any other
brace is left alone, so that a prompt may show JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VARIABLE = re.compile(r"\{\{(?P<literal>[^\W\d]\w*)\}\}|\{(?P<name>[^\W\d]\w*)\}")


def variables_in(text: str) -> list[str]:
    """Names of the variables of a text, in order."""
    return [match["name"] for match in _VARIABLE.finditer(text) if match["name"]]


def fill_variables(text: str, values: Mapping[str, str]) -> str:
    """Put values in the place of variables; a value is never searched for variables itself.

    Raises:
        KeyError: a variable without a value.
    """

    def replace(match: re.Match[str]) -> str:
        return values[match["name"]] if match["name"] else "{" + match["literal"] + "}"

    return _VARIABLE.sub(replace, text)
