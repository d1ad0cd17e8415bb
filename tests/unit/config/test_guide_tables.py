"""The key tables of the guides are those of the schemas, in both languages."""

from __future__ import annotations

import pytest

from tests.unit.config.guide_tables import EXAMPLES, FILES, GUIDES, Key, example_of, keys, rewritten, tables

KEYS = [key for file in FILES for key in keys(file)]


@pytest.mark.parametrize("language", GUIDES)
def test_every_key_is_there_once_and_has_a_meaning(language: str) -> None:
    found = [
        (f"{file}.{name}", meaning) for file, rows in tables(GUIDES[language].read_text()) for name, meaning in rows
    ]
    names = [name for name, _ in found]
    assert sorted(names) == sorted(set(names))
    missing = sorted({key.path for key in KEYS} - set(names))
    unknown = sorted(set(names) - {key.path for key in KEYS})
    assert not missing, f"add a line | `key` | meaning | for each to {GUIDES[language]}: {missing}"
    assert not unknown, unknown
    assert all(len(meaning) > 3 for _, meaning in found)


@pytest.mark.parametrize("language", GUIDES)
def test_values_and_defaults_are_the_schemas(language: str) -> None:
    text = GUIDES[language].read_text()
    assert text == rewritten(text, language), "run python -m tests.unit.config.guide_tables"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_every_example_is_a_value_that_the_key_takes(key: Key) -> None:
    from vlm_dist.config.yaml_document import parse_document

    document = parse_document(example_of(key), "example", has_lines=False)
    assert not document.problems
    name = key.path.rpartition(".")[2]
    required = {
        "type": "tar" if key.path.startswith("data.") else "text",
        "role": "user",
        "content": [{"type": "image"}],
    }
    beside = {one: required[one] for one, field in key.schema.model_fields.items() if field.is_required()}
    read = key.schema.model_validate(beside | {name: document.value})
    default = key.field.get_default(call_default_factory=True)
    has_choice = key.path not in ("collator.video_processing.frame_extraction.sampling_strategy", "peft.task_type")
    assert getattr(read, name) != default or not has_choice


def test_no_example_is_left_over() -> None:
    assert set(EXAMPLES) <= {key.path for key in KEYS}
