"""The guides of configs/ as tests read them: code blocks with what marks them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.unit.config.guide_tables import GUIDES

_BLOCK = re.compile(r"(?:<!-- case: (?P<case>[^\n]+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
_HEADING = re.compile(r"^#{1,3} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        heading: the nearest above it.
        case: which fault prints it, where it is a message.
    """

    heading: str
    language: str
    text: str
    case: str | None
    line: int

    @property
    def file(self) -> str:
        """The first line's comment: the file that this is a part of, or a run file that this is."""
        return self.text.splitlines()[0].removeprefix("# ")


def blocks(guide: str) -> list[Block]:
    """Every code block of the guide in "en" or "ko", in order."""
    text = GUIDES[guide].read_text(encoding="utf-8")
    code = [(match.start(), match.end()) for match in _BLOCK.finditer(text)]
    headings = [
        (match.start(), match[1])
        for match in _HEADING.finditer(text)
        if not any(start <= match.start() < end for start, end in code)
    ]
    found = []
    for match in _BLOCK.finditer(text):
        above = [title for start, title in headings if start < match.start()]
        line = text[: match.start()].count("\n") + 1
        found.append(Block(above[-1], match["language"], match["text"], match["case"], line))
    return found


def without_comments(text: str) -> str:
    """Code without what is said beside it, which each guide says in its own language."""
    lines = text.splitlines()
    return "\n".join([lines[0], *(re.sub(r"\s+#.*$", "", line) for line in lines[1:])])


def pattern(message: str) -> re.Pattern[str]:
    """What a message must match: `…` stands for anything, and lines may be broken anywhere."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in message.split("…")]
    return re.compile(r".*?\s*".join(rf"\s*{part}" if part else "" for part in parts), re.DOTALL)
