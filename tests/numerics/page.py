"""Writes docs/numerics.md: `python -m tests.numerics.page`. Prose and figures come from the tests' own constants."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
_HEAD = "| ranks x accumulation x per device | ZeRO | batches | gradient | loss | equal |"


def rows_of_page(text: str) -> dict[str, bool]:
    """The rows that a page shows, and whether they were equal."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1].isdigit():
            curve = "" if cells[3] != "bf16 curve" else ", bf16 curve"
            rows[f"{cells[0]}, ZeRO-{cells[1]}, {cells[2]}{curve}"] = cells[5] == "yes"
    return rows


def table_of_page(page: str) -> str:
    """The table alone, as it stands there."""
    lines = page.splitlines()
    start = lines.index(_HEAD)
    return "\n".join(lines[start : lines.index("", start)])


def main() -> None:
    """Measure, then write."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    from tests.numerics.table import make_table_run, measure, rows

    with tempfile.TemporaryDirectory() as directory:
        measured = measure(make_table_run(Path(directory)), rows())
    lines = [_HEAD, "|---|---|---|---|---|---|"]
    for one in measured:
        row = one.row
        gradient = "bf16 curve" if row.bf16 else f"{one.gradient_difference:.1e}"
        lines.append(
            f"| {row.world_size} x {row.accumulation} x {row.per_device} | {row.stage} | {row.mode} | {gradient} | "
            f"{one.loss_difference:.1e} | {'yes' if one.is_good else 'NO'} |"
        )
    PAGE.write_text(text("\n".join(lines)), encoding="utf-8")
    print(PAGE)


def text(table: str) -> str:
    """The whole page."""
    from tests.numerics import table as t

    template = (Path(__file__).parent / "page.md").read_text(encoding="utf-8")
    values = {
        "table": table,
        "max_gradient": f"{t.MAX_GRADIENT_DIFFERENCE:g}",
        "max_loss": f"{t.MAX_LOSS_DIFFERENCE:g}",
        "max_curve": f"{t.MAX_CURVE_DIFFERENCE:.0%}",
        "num_samples": sum(t.NUM_SAMPLES.values()),
        "num_steps": t.NUM_STEPS,
        "num_curve_steps": t.NUM_CURVE_STEPS,
        "global_batch_size": t.GLOBAL_BATCH_SIZE,
    }
    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return template


if __name__ == "__main__":
    main()
