"""Values as yaml.safe_load reads them, with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dist.config.yaml_document import dotted, dump_yaml, parse_document, read_document

KEYS = st.text("abcdefgh_", min_size=1, max_size=6)
SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8) | st.floats(-1e6, 1e6)
INNER = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
TREES = st.dictionaries(KEYS, INNER, max_size=4)


def paths(tree: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, child in items for found in paths(child, (*path, key)))]


@settings(deadline=None, max_examples=60)
@given(tree=TREES, flow=st.booleans())
def test_values_are_those_of_safe_load_and_each_has_a_line(tree: dict[str, Any], flow: bool) -> None:
    text = yaml.safe_dump(tree, default_flow_style=True) if flow else dump_yaml(tree)
    document = parse_document(text, "f.yaml")
    assert document.problems == []
    if not flow:
        assert document.value == tree
        assert yaml.safe_load(text) == tree
    assert set(document.origins) == set(paths(tree))


@settings(deadline=None, max_examples=60)
@given(
    keys=st.lists(KEYS, min_size=1, max_size=8, unique=True),
    gaps=st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_lines_are_those_of_the_keys(keys: list[str], gaps: list[int]) -> None:
    lines: list[str] = []
    expected = {}
    for key, gap in zip(keys, gaps, strict=False):
        lines += ["# a comment", ""][:gap]
        lines.append(f'"{key}":')
        expected[key] = len(lines)
        lines += ["    inner: 1"]
    document = parse_document("\n".join(lines), "f.yaml")
    for key, line in expected.items():
        assert str(document.origins[(key,)]) == f"f.yaml:{line}"
        assert document.origins[(key, "inner")].line == line + 1


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "+1e5", "-2e3", "1.e5", ".5e3"])
def test_exponents_are_numbers(text: str) -> None:
    value = parse_document(f"x: {text}", "f").value["x"]
    assert isinstance(value, float)
    assert value == float(text)


@pytest.mark.parametrize("text", ["e5", "1e", "1e-5x", "'1e-5'", "v1e5", "1e-5-1"])
def test_what_only_looks_like_one_stays_text(text: str) -> None:
    assert isinstance(parse_document(f"x: {text}", "f").value["x"], str)


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    document = parse_document("a:\n  b: 1\n  c: 2\n  b: 3\n", "f.yaml")
    assert [str(problem) for problem in document.problems] == ["f.yaml:4: a.b: given twice; first on line 2"]


def test_all_duplicates_are_found() -> None:
    assert len(parse_document("a: 1\na: 2\nb: {c: 1, c: 2}\n", "f").problems) == 2


def test_merge_keys_work_and_may_be_overridden() -> None:
    document = parse_document("base: &base {x: 1, y: 2}\nother:\n  <<: *base\n  y: 3\n", "f")
    assert document.problems == []
    assert document.value["other"] == {"x": 1, "y": 3}
    assert document.origins[("other", "y")].line == 4
    assert document.origins[("other", "x")].line == 1


def test_keys_are_text() -> None:
    document = parse_document("a:\n  on: 1\n  2: x\n", "f")
    assert [str(problem) for problem in document.problems] == [
        "f:2: a: got the key on, expected text; put it in quotes",
        "f:3: a: got the key 2, expected text; put it in quotes",
    ]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: [1, 2\nb: 3\n", "f:2: "),
        ("a: b: c", "f:1: "),
        ("\ta: 1", "f:1: "),
        ("a: *b", "f:1: "),
        ("? [a]\n: 1", "f:1: "),
    ],
)
def test_what_is_not_yaml_says_where(text: str, where: str) -> None:
    document = parse_document(text, "f")
    assert document.value == {}
    assert len(document.problems) == 1
    assert str(document.problems[0]).startswith(where + "not valid YAML: ")


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: 2024-13-45", "a: !!python/object:os.system x", "a: 1\n---\nb: 2", "a: \x00"]
)
def test_traps_are_problems_and_no_crash(text: str) -> None:
    assert len(parse_document(text, "f").problems) == 1


def test_an_empty_file_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("# only a comment\n")
    assert read_document(tmp_path / "f.yaml").value == {}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    found = {name: str(read_document(tmp_path / name).problems[0]) for name in ("none.yaml", "latin.yaml", ".")}
    assert "no such file" in found["none.yaml"]
    assert "not UTF-8" in found["latin.yaml"]
    assert "is a directory" in found["."]


def test_paths_are_shown_as_set_reads_them() -> None:
    assert dotted(("data", "train", 0, "path")) == "data.train[0].path"
    assert dotted(("model", "model_classes", "a/b-1.5", "model_class")) == 'model.model_classes."a/b-1.5".model_class'
