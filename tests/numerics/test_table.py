"""The table of invariances (see `tests.numerics.table`): each row a run, all against one plain loop in float32.

`python -m tests.numerics.page` writes it into docs/numerics.md.
"""

from __future__ import annotations

import pytest

from tests.numerics.page import PAGE, rows_of_page, table_of_page, text
from tests.numerics.table import Measured, Row, line, make_table_run, measure, name_of, rows

pytestmark = [pytest.mark.numerics, pytest.mark.engine]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Row, Measured]:
    found = measure(make_table_run(tmp_path_factory.mktemp("table")), rows())
    return {one.row: one for one in found}


def test_the_table_is_printed(measured: dict[Row, Measured], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(line(one) for one in measured.values()))
    assert len(measured) == len(rows())


@pytest.mark.parametrize("row", rows(), ids=name_of)
def test_the_gradient_is_that_of_a_plain_loop(measured: dict[Row, Measured], row: Row) -> None:
    assert measured[row].is_good, line(measured[row]) + "  " + measured[row].worst


def test_the_page_has_these_rows() -> None:
    """Figures differ from machine to machine; what was compared, and how well, does not."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == text(table_of_page(page)), "run python -m tests.numerics.page"
    shown = rows_of_page(page)
    assert list(shown) == [name_of(row) for row in rows()], "run python -m tests.numerics.page"
    assert all(shown.values())
