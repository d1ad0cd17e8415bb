"""No key is forgotten: each has a test that shows its effect, or is refused as not yet supported."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import tests.unit.test_key_effects as package
from tests.tiny_run import ROOT
from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import SHOWN, all_keys
from vlm_dist.errors import ConfigError

#: Key -> the test outside of this package that shows its effect.
ELSEWHERE: dict[str, str] = {
    "data.max_bad_share": "tests/e2e/test_fault_corpus.py::test_more_than_allowed_ends_all_ranks_with_one_message",
    "train.memory_check": "tests/engine/test_memory_check.py::test_it_fails_at_minute_one",
}

#: Keys that are refused, whatever they are set to.
REFUSED: dict[str, object] = {}

#: Values that are refused, of keys with an effect.
REFUSED_VALUES = {
    "train.report_to": ["mlflow"],
}

for module in pkgutil.iter_modules(package.__path__):
    if module.name.startswith("test_") and not __name__.endswith(module.name):
        importlib.import_module(f"{package.__name__}.{module.name}")


@pytest.mark.parametrize("key", all_keys())
def test_every_key_has_an_effect(key: str) -> None:
    assert (key in SHOWN) + (key in ELSEWHERE) + (key in REFUSED) > 0, f'no test says @shows("{key}")'
    assert key not in REFUSED or key not in SHOWN


def test_no_test_shows_a_key_that_there_is_not() -> None:
    assert {*SHOWN, *ELSEWHERE, *REFUSED, *REFUSED_VALUES} <= set(all_keys())


def test_there_are_keys() -> None:
    """The walk finds what lies in lists, in mappings and beside fixed keys."""
    assert {
        "train.seed",
        "data.train[].repeat",
        "collator.message_format.training_messages[].content[].text",
        "model.model_classes.*.loading_params.revision",
        "collator.dataset_columns.*",
    } <= set(all_keys())
    assert len(all_keys()) > 100


def test_what_is_elsewhere_is_there() -> None:
    for key, test in ELSEWHERE.items():
        file, name = test.split("::")
        functions = {node.name for node in ast.walk(ast.parse(Path(ROOT, file).read_text())) if hasattr(node, "name")}
        assert name in functions, f"{key}: there is no {test}"


@pytest.mark.parametrize(("key", "value"), [*REFUSED.items(), *REFUSED_VALUES.items()])
def test_what_is_not_built_is_refused(project: Project, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match="not yet supported"):
        project.config({key: value})
