"""From a run file, the five files it names and `--set` to one checked `RunConfig`, or to all that is wrong at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlm_dist.config.explain import describe, explain, suggest_key
from vlm_dist.config.laws import Draft, findings
from vlm_dist.config.layers import Layers, split_key
from vlm_dist.config.masking import masked
from vlm_dist.config.run import SECTIONS, ConfigFiles, RunConfig, RunFile
from vlm_dist.config.section import Section
from vlm_dist.config.yaml_document import (
    Document,
    KeyPath,
    Origin,
    Problem,
    display_path,
    dotted,
    parse_document,
    read_document,
)
from vlm_dist.errors import ConfigError

_RUN_KEYS = ("model_id", "deepspeed")  # beside the sections, in a resolved configuration and for --set
_RUN_FILE_KEYS = {"configs", "overrides"}  # only a run file has them


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check everything that decides a run.

    Args:
        path: a run file, or the resolved configuration that an earlier run wrote.
        overrides: `section.key=value` as given to `--set`; the value is YAML, later ones win.

    Raises:
        ConfigError: with every problem of all files, one per line.
    """
    loading = _Load(Path(path))
    config = loading.run(overrides)
    if config is None or loading.problems:
        raise _config_error(loading.problems, loading.sources)
    return config


@dataclass(frozen=True)
class Drafted:
    """A configuration with what is wrong with it.

    Attributes:
        config: with defaults in the place of wrong values; None: there is not enough for one.
        problems: in the order of the files; most have one line.
        broken: sections in which something is wrong: nothing can be said of what depends on them.
    """

    config: RunConfig | None
    problems: list[str]
    broken: frozenset[str]


def draft_run(path: Path | str, overrides: Sequence[str] = ()) -> Drafted:
    """Read what decides a run, to examine as much of it as can be: nothing is raised.

    Args:
        path: a run file, or a resolved configuration.
        overrides: as given to `--set`.
    """
    loading = _Load(Path(path))
    config = loading.run(overrides)
    problems = _ranked(loading.problems, loading.sources)
    sections = {str(one[0]) for one in loading.broken if one}
    return Drafted(config, problems, frozenset(sections))


class _Load:
    """One load: the tree of values, and what was found wrong with it so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layers = Layers()
        self.problems: list[Problem] = []
        self.broken: list[KeyPath] = []  # paths whose values are wrong: no law is applied to them
        self.sources: list[str] = []  # in the order in which problems are reported

    def run(self, overrides: Sequence[str]) -> RunConfig | None:
        """The configuration, as good as it can be made; None: there is not enough for one. See `problems`."""
        document = self._read(self.path)
        if not isinstance(document.value, dict):
            self._problem(document.origins[()], "", f"got {describe(document.value)}, expected keys: model, configs, …")
            document.value = {}
        if self.problems and not document.value:
            return None
        if isinstance(document.value, dict) and "model_id" in document.value and not _RUN_FILE_KEYS & {*document.value}:
            self._lay_resolved(document)
        else:
            self._lay_run_file(document)
        for override in overrides:
            self._lay_override(override)
        return self._check()

    def _read(self, path: Path) -> Document:
        self.sources.append(display_path(path))
        document = read_document(path)
        self.problems += document.problems
        return document

    def _lay_resolved(self, document: Document) -> None:
        known = [*_RUN_KEYS, *SECTIONS]
        for key in [key for key in document.value if key not in known]:
            self._problem(document.origins[(key,)], key, f"got an unknown key, expected one of {', '.join(known)}")
            del document.value[key]
        for key in [key for key in _RUN_KEYS if key not in document.value]:
            self._problem(Origin(display_path(self.path)), key, "is missing, expected text")
        self.layers.lay(document.value, document.origins)

    def _lay_run_file(self, document: Document) -> None:
        run, _ = self._validate("", RunFile, document.value, document.origins)
        self._lay_files(run.configs, document)
        for key, name, value in (("model_id", "model", run.model), ("deepspeed", "deepspeed", run.deepspeed)):
            if value is not None:
                text = self._beside(value) if key == "deepspeed" else value
                origin = document.origins.get((name,), Origin(display_path(self.path)))
                self.layers.lay(text, {(): origin}, (key,))
            elif document.value.get(name) is None:
                self._problem(Origin(display_path(self.path)), name, "is missing, expected a hub id or a directory")
        for section, values in run.overrides.items():
            inner = {p[2:]: o for p, o in document.origins.items() if p[:2] == ("overrides", section)}
            if section not in SECTIONS:
                hint = suggest_key(section, list(SECTIONS), SECTIONS)
                self._problem(inner[()], f"overrides.{section}", f"got an unknown section{hint}")
            elif values is not None:
                self.layers.lay(values, inner, (section,))

    def _beside(self, value: str) -> str:
        return os.path.normpath(self.path.parent / Path(value).expanduser())

    def _lay_files(self, files: ConfigFiles, run_document: Document) -> None:
        for section in SECTIONS:
            path = Path(self._beside(getattr(files, section)))
            if not path.exists():
                origin = run_document.origins.get(("configs", section), Origin(display_path(self.path)))
                self._problem(origin, f"configs.{section}", f"no such file: {display_path(path)}")
                self.broken.append((section,))
                continue
            document = self._read(path)
            if document.problems and document.value == {}:
                self.broken.append((section,))
            self.layers.lay(document.value, document.origins, (section,))

    def _lay_override(self, override: str) -> None:
        origin = Origin(f"--set {masked(override)}")
        self.sources.append(origin.source)
        key, equals, text = override.partition("=")
        path = split_key(key.strip())
        if not equals or path is None:
            self.problems.append(Problem(origin, "expected section.key=value, such as train.learning_rate=1e-4"))
            return
        if path[0] not in {*SECTIONS, *_RUN_KEYS}:
            choices = [*SECTIONS, *_RUN_KEYS]
            self._problem(origin, key, f"got an unknown section{suggest_key(str(path[0]), choices, SECTIONS)}")
            return
        document = parse_document(text, origin.source, has_lines=False)
        self.problems += document.problems
        if document.problems:
            return
        value = document.value if text.strip() else None
        if path == ("model",) and isinstance(value, str):
            self._problem(
                origin, key, "got text, but model is the section of vlm_model_config.yaml; did you mean model_id?"
            )
            return
        try:
            self.layers.lay(value, document.origins, path)
        except KeyError as error:
            self.problems.append(Problem(origin, str(error.args[0])))

    def _check(self) -> RunConfig | None:
        sections = {}
        for name, schema in SECTIONS.items():
            sections[name], broken = self._validate(name, schema, self.layers.value.get(name, {}))
            self.broken += broken
        model_id, deepspeed = (self._run_text(key) for key in _RUN_KEYS)
        if deepspeed is not None and not Path(deepspeed).is_file():
            self._problem(self._locate(("deepspeed",)), "deepspeed", f"no such file: {deepspeed}")
            self.broken.append(("deepspeed",))
        notices = self._apply_laws(Draft(model_id, **sections))
        if model_id is None or deepspeed is None:
            return None
        return RunConfig(model_id=model_id, deepspeed=Path(deepspeed), notices=notices, **sections)

    def _run_text(self, key: str) -> str | None:
        """The model id or the path of the JSON; what is missing has been reported with the run file."""
        if key not in self.layers.value:
            return None
        value = self.layers.value[key]
        if isinstance(value, str) and value:
            return str(Path(value).expanduser()) if value.startswith("~") else value
        self._problem(self._locate((key,)), key, f"got {describe(value)}, expected text")
        return None

    def _apply_laws(self, draft: Draft) -> tuple[str, ...]:
        notices, violated = [], []
        for finding in findings(draft):
            if any(_overlap(path, broken) for path in (finding.path, *finding.also) for broken in self.broken):
                continue
            problem = Problem(self._locate(finding.path), f"{dotted(finding.path)}: {finding.message}")
            if finding.is_notice:
                notices.append(str(problem))
            else:
                self.problems.append(problem)
                violated.append(finding.path)
        self.broken += violated  # only now: another law about the same value has its own word to say
        return tuple(notices)

    def _validate(
        self, name: str, schema: type[Section], value: Any, origins: Mapping[KeyPath, Origin] | None = None
    ) -> tuple[Any, list[KeyPath]]:
        """The section, and which of its paths are wrong: those have their defaults, so that laws can see the rest."""
        prefix: KeyPath = (name,) if name else ()
        broken: list[KeyPath] = []
        try:
            return schema.model_validate(value), broken
        except ValidationError as error:
            for path, message in explain(error, schema, SECTIONS):
                full = (*prefix, *path)
                self._problem(self._locate(full, origins), dotted(full), message)
                broken.append(_outside_lists(full))
        for path in broken:
            value = _without(value, path[len(prefix) :])
        try:
            return schema.model_validate(value), broken
        except ValidationError:  # something required is among what is wrong
            return schema(), [*broken, prefix]

    def _locate(self, path: KeyPath, origins: Mapping[KeyPath, Origin] | None = None) -> Origin:
        layers = self.layers
        if origins is not None:
            layers = Layers()
            layers.origins = dict(origins)
        return layers.locate(path) or Origin(display_path(self.path))

    def _problem(self, origin: Origin, name: str, message: str) -> None:
        self.problems.append(Problem(origin, f"{name}: {message}" if name else message))


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]


def _outside_lists(path: KeyPath) -> KeyPath:
    """Up to the first list: taking one item out would renumber the others."""
    return next((path[:i] for i, part in enumerate(path) if isinstance(part, int)), path)


def _without(value: Any, path: KeyPath) -> Any:
    """A copy without the value at a path, or without its closest present parent."""
    if not path or not isinstance(value, dict):
        return {}
    key, rest = path[0], path[1:]
    if key not in value:
        return {}
    if rest and isinstance(value[key], dict) and rest[0] in value[key]:
        return {**value, key: _without(value[key], rest)}
    return {other: child for other, child in value.items() if other != key}


def _config_error(problems: Sequence[Problem], sources: Sequence[str]) -> ConfigError:
    return ConfigError("\n".join(_ranked(problems, sources)))


def _ranked(problems: Sequence[Problem], sources: Sequence[str]) -> list[str]:
    order = {source: rank for rank, source in reversed(list(enumerate(sources)))}
    ranked = sorted(problems, key=lambda p: (order.get(p.origin.source, len(order)), p.origin.line))
    return list(dict.fromkeys(str(problem) for problem in ranked))
