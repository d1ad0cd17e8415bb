"""Every family does what docs/models.md says it does, and is refused what it cannot do."""

from __future__ import annotations

import pytest

from tests.unit.families.cells import CELLS
from tests.unit.families.page import FAMILIES_SHOWN, read_page, try_cell
from tests.unit.families.subjects import subject


@pytest.mark.parametrize("column", CELLS)
@pytest.mark.parametrize("name", FAMILIES_SHOWN)
def test_the_table_is_true(name: str, column: str) -> None:
    assert try_cell(subject(name), column) == read_page()[name, column]
