"""The README.md of a merged model: where it comes from, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_dist.export.opening import Origin
from vlm_dist.observability.jsonl import METRICS_FILE, read_metrics

_CARD = """\
---
base_model: {base}
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

{base} with what a LoRA fine-tuning run has learned, merged into its weights ({dtype}).

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```
"""


def write_card(directory: Path, origin: Origin, facts: Mapping[str, Any]) -> None:
    """Write README.md.

    Args:
        directory: of the merged model.
        origin: of the adapter.
        facts: of merge_info.json.
    """
    name = origin.run_dir.name
    rows = {"adapter": facts["adapter"], **{f"sha256 of {file}": digest for file, digest in origin.hashes.items()}}
    peft = origin.config.peft
    rows["LoRA"] = f"r {peft.r}, alpha {peft.lora_alpha}, towers {json.dumps(peft.towers.model_dump())}"
    rows |= _figures(origin.run_dir)
    rows |= {f"version of {package}": number for package, number in facts["versions"].items()}
    lines = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    text = _CARD.format(base=facts["base"], name=name, dtype=facts["dtype"], rows=lines)
    (directory / "README.md").write_text(text, encoding="utf-8")


def _figures(run_dir: Path) -> dict[str, str]:
    """The last evaluation of the run, where it is on record."""
    try:
        last = [*read_metrics(run_dir / METRICS_FILE, "eval")][-1]
    except (OSError, IndexError):
        return {}
    numbers = {name: value for name, value in last.items() if isinstance(value, int | float) and "/" in name}
    return {f"{name} (step {last.get('step')})": f"{value:.4g}" for name, value in numbers.items()}


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
