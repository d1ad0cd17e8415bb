"""Every family does what docs/models.md says it does, and is refused what it cannot do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.families.cells import CELLS
from tests.unit.families.page import FAMILIES_SHOWN, read_page, try_cell
from tests.unit.families.subjects import subject
from tests.unit.families.zoo.originals import ORIGINALS
from vlm_dist.families import GENERIC


@pytest.mark.parametrize("column", CELLS)
@pytest.mark.parametrize("name", FAMILIES_SHOWN)
def test_the_table_is_true(name: str, column: str) -> None:
    if name in ORIGINALS and (variable := ORIGINALS[name].missing) is not None:
        pytest.skip(f"{variable} names no directory with this model's own code, which is not ours to ship")
    assert try_cell(subject(name), column) == read_page()[name, column]


#: Families whose processors have a chat template: the one thing that no generic row can supply.
WITH_TEMPLATE = [name for name in FAMILIES_SHOWN if name not in ("llava", "paligemma", *ORIGINALS)]


@pytest.mark.parametrize("column", ["image", "text only", "mixed", "multi-image", "assistant masks"])
@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_a_model_of_a_type_without_a_row_is_served_by_the_generic_one(name: str, column: str) -> None:
    assert try_cell(replace(subject(name), family=GENERIC), column) == ("yes", "")
