"""Later layers win, key by key, and every value remembers who wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from tests.unit.config.test_yaml_document import TREES, paths
from vlm_dist.config.layers import Layers, split_key
from vlm_dist.config.yaml_document import KeyPath, Origin, dotted


def written_by(source: str, tree: Any) -> dict[KeyPath, Origin]:
    return {path: Origin(source) for path in paths(tree)}


def merged(base: Any, top: Any) -> Any:
    """The law, said in the simplest way."""
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{key: merged(base[key], child) if key in base else child for key, child in top.items()}}
    return top


@settings(deadline=None, max_examples=60)
@given(base=TREES, top=TREES)
def test_deep_merge(base: dict[str, Any], top: dict[str, Any]) -> None:
    layers = Layers()
    layers.lay(base, written_by("base", base))
    layers.lay(top, written_by("top", top))
    assert layers.value == merged(base, top)
    assert set(layers.origins) == set(paths(layers.value))
    for path in paths(top):
        node: Any = top
        for part in path:
            node = node[part]
        if not isinstance(node, dict):
            assert layers.origins[path].source == "top"


@settings(deadline=None, max_examples=60)
@given(base=TREES, top=TREES)
def test_laying_changes_neither_input(base: dict[str, Any], top: dict[str, Any]) -> None:
    before = repr((base, top))
    layers = Layers()
    layers.lay(base, {})
    layers.lay(top, {})
    layers.lay(top, {}, ("z", "b"))
    assert repr((base, top)) == before


def test_into_lists_by_index() -> None:
    layers = Layers()
    layers.lay({"train": [{"path": "a", "repeat": 1}, {"path": "b"}]}, {})
    layers.lay("c", {(): Origin("set")}, ("train", 1, "path"))
    layers.lay(2, {(): Origin("set")}, ("train", "0", "repeat"))
    assert layers.value == {"train": [{"path": "a", "repeat": 2}, {"path": "c"}]}
    assert layers.origins[("train", 1, "path")].source == "set"
    for wrong in (2, "first"):
        with pytest.raises(KeyError, match="a list of 2"):
            layers.lay(1, {}, ("train", wrong, "path"))


def test_a_replaced_value_forgets_its_lines() -> None:
    layers = Layers()
    layers.lay({"a": {"b": 1}}, {(): Origin("f", 1), ("a",): Origin("f", 1), ("a", "b"): Origin("f", 2)})
    layers.lay([5], {(): Origin("set"), (0,): Origin("set")}, ("a",))
    assert str(layers.locate(("a", "b"))) == "set"


def test_a_missing_value_is_located_by_the_mapping_around_it() -> None:
    layers = Layers()
    layers.lay({"a": {"b": {}}}, {(): Origin("f", 1), ("a",): Origin("f", 3), ("a", "b"): Origin("f", 4)})
    assert str(layers.locate(("a", "b", "c"))) == "f:4"


@pytest.mark.parametrize(
    "path",
    [
        ("train", "seed"),
        ("data", "train", 0, "path"),
        ("model", "model_classes", "a/b-1.5", "model_class"),
        ("data", 3),
    ],
)
def test_keys_are_read_as_they_are_shown(path: KeyPath) -> None:
    assert split_key(dotted(path)) == path


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b", "a[b]", "a[", '"a', "a b]"])
def test_what_is_no_key(text: str) -> None:
    assert split_key(text) is None
