"""YAML with a memory: values as `yaml.safe_load` reads them, and the line that each of them was written on.

Three differences from `yaml.safe_load`, each because a config file is written by hand: `1e-5` is a number (YAML 1.1
reads text), a key given twice is refused (the last one would win in silence), and keys are text (an unquoted `on:`
would be the key `True`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: Names a value inside a document: keys of mappings and indices of lists, from the root.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a value was written: a line of a file, or a `--set` (which has no line)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong, where, and how to fix it."""

    origin: Origin
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.message}"


@dataclass(slots=True)
class Document:
    """One parsed file.

    Attributes:
        value: plain Python values; `{}` for an empty file or one that cannot be read.
        origins: where each value was written, by its path from the root; the root is `()`.
        problems: what is wrong with the file itself, apart from any schema.
    """

    value: Any
    origins: dict[KeyPath, Origin]
    problems: list[Problem] = field(default_factory=list)


class _NumberLoader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5`, `1.e5` and `.5E3` as numbers, as YAML 1.2 does."""


class _NumberDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which that loader would read as a number, such as a run named `1e5`."""


for _class in (_NumberLoader, _NumberDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """PyYAML folds Unicode line breaks inside single quotes, and reads them back as spaces."""
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_NumberDumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """YAML that `parse_document` reads back to the same value."""
    return str(yaml.dump(value, Dumper=_NumberDumper, sort_keys=False, allow_unicode=True, width=120))


def display_path(path: Path) -> str:
    """A path as the user would type it: relative to the working directory when it is below it."""
    absolute, here = os.path.abspath(path), os.path.abspath(Path.cwd())  # noqa: PTH100 - resolve() follows links
    return os.path.relpath(absolute, here) if absolute.startswith(here + os.sep) else str(path)


def _existing_parent(path: Path) -> Path:
    """The deepest directory of a path that exists."""
    return next(parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir())  # noqa: PTH100 - as above


def read_document(path: Path) -> Document:
    """Parse a YAML file; a file that is missing or not YAML is a problem of the document, not an exception."""
    source = display_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _broken(Origin(source), f"no such file (looked in {_existing_parent(path)})")
    except IsADirectoryError:
        return _broken(Origin(source), "is a directory, expected a YAML file")
    except UnicodeDecodeError as error:
        return _broken(Origin(source), f"is not UTF-8 text (byte {error.start})")
    except OSError as error:
        return _broken(Origin(source), f"cannot be read: {error.strerror}")
    return parse_document(text, source)


def parse_document(text: str, source: str, *, has_lines: bool = True) -> Document:
    """Parse YAML text.

    Args:
        text: one YAML document.
        source: the name that problems are reported under.
        has_lines: False for text from the command line, where a line number would say nothing.
    """
    try:
        loader = _NumberLoader(text)
        root = loader.get_single_node()
        if root is None:
            return Document({}, {(): Origin(source, 1 if has_lines else 0)})
        reader = _NodeReader(loader, source, has_lines)
        value = reader.read(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark and has_lines else 0
        context = f" ({error.context})" if error.context else ""
        return _broken(Origin(source, line), f"not valid YAML: {error.problem}{context}")
    except yaml.YAMLError as error:  # an unprintable character
        return _broken(Origin(source), f"not valid YAML: {error}".splitlines()[0])
    return Document(value, reader.origins, reader.problems)


def _broken(origin: Origin, message: str) -> Document:
    return Document({}, {(): origin}, [Problem(origin, message)])


class _NodeReader:
    """Turns composed nodes into values, noting origins on the way."""

    def __init__(self, loader: _NumberLoader, source: str, has_lines: bool) -> None:
        self.loader = loader
        self.source = source
        self.has_lines = has_lines
        self.origins: dict[KeyPath, Origin] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()  # nodes being read: an alias to one of them would never end

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.origins.setdefault(path, self._origin(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            raise yaml.constructor.ConstructorError(None, None, "an alias that contains itself", node.start_mark)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # 2024-13-45 looks like a date and is none
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        first_lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self._key(key_node)
            if key in first_lines:
                where = f"; first on line {first_lines[key]}" if self.has_lines else ""
                self._problem(key_node, f"{dotted((*path, str(key)))}: given twice{where}")
            first_lines.setdefault(key, key_node.start_mark.line + 1)
        self.loader.flatten_mapping(node)  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if not isinstance(key, str):
                message = f"{dotted(path)}: got the key {node_text(key_node)}, expected text; put it in quotes"
                self._problem(key_node, message.removeprefix(": "))
                continue
            child = (*path, key)
            for known in [known for known in self.origins if known[: len(child)] == child]:
                del self.origins[known]  # merged in by `<<`, then given again: the later one counts
            self.origins[child] = self._origin(key_node)
            values[key] = self.read(value_node, child)
        return values

    def _key(self, node: yaml.Node) -> Hashable:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", node.start_mark)
        key: Hashable = self._scalar(node)
        return key

    def _origin(self, node: yaml.Node) -> Origin:
        return Origin(self.source, node.start_mark.line + 1 if self.has_lines else 0)

    def _problem(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(self._origin(node), message))


def node_text(node: yaml.Node) -> str:
    """A scalar as it was written."""
    return str(node.value)


def dotted(path: KeyPath) -> str:
    """`("train", 0, "path")` -> `train[0].path`; a key with a dot in it is quoted, as `--set` wants it."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (f'"{part}"' if "." in part else part)
    return text
