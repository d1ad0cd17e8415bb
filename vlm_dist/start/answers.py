"""What a run file needs to know: given, found in the data, or asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_dist.config import DataSource
from vlm_dist.data.sources import open_source
from vlm_dist.errors import ConfigError, DataError

#: What columns are called, the likeliest first.
USUAL_NAMES: Mapping[str, Sequence[str]] = {
    "messages": ("messages", "conversations", "conversation"),
    "image": ("image", "images", "image_path", "img", "picture", "jpg;png", "jpg", "png", "jpeg", "webp"),
    "video": ("video", "videos", "video_path", "clip", "mp4"),
    "question": ("question", "query", "instruction", "prompt", "problem", "input", "text"),
    "answer": ("answer", "response", "output", "answers", "label", "caption", "target", "completion"),
}
DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


@dataclass(frozen=True)
class Answers:
    """All that a run file says.

    Attributes:
        model: hub id or local directory.
        data: shards, a file of JSON lines, or the name of a data set.
        eval_data: the same, held out; None: none.
        media_root: where relative paths in the data start.
        columns: kind -> column, of `USUAL_NAMES`.
        num_gpus: over all nodes.
        output_dir: of the run.
    """

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    media_root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    num_gpus: int | None = None
    output_dir: Path | None = None


def source_of(data: str, media_root: str | None = None) -> dict[str, Any]:
    """An entry of `data.train` for what a person names.

    Args:
        data: a directory of shards or of a saved data set, a file or glob, or a name on the hub.
        media_root: where relative paths in the data start.
    """
    path = Path(data).expanduser()
    root = {} if media_root is None else {"media_root": media_root}
    if data.endswith((".jsonl", ".ndjson", ".json")):
        return {"type": "jsonl", "path": data, "media_root": media_root or str(path.parent)}
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        split = {"split": "train"} if (path / "dataset_dict.json").is_file() else {}
        return {"type": "hf", "path": data, **split, **root}
    if "://" in data or data.endswith(".tar") or "*" in data or path.exists():
        return {"type": "tar", "path": data}
    return {"type": "hf", "name": data, "split": "train", **root}


def look(data: str, media_root: str | None, index_dir: Path) -> list[str]:
    """The columns of a source.

    Args:
        data: see `source_of`.
        media_root: see `source_of`.
        index_dir: where an index goes that cannot lie beside the data.

    Raises:
        DataError: it cannot be opened.
    """
    return list(open_source(DataSource(**source_of(data, media_root)), index_dir).columns)


def guess(columns: Sequence[str]) -> dict[str, str]:
    """Which column is what, by its name; conversations make question and answer needless."""
    there = {column.casefold(): column for column in columns}
    found = {
        kind: there[name]
        for kind, names in USUAL_NAMES.items()
        if (name := next((name for name in names if name in there), None)) is not None
    }
    if "messages" in found:
        found = {kind: column for kind, column in found.items() if kind not in ("question", "answer")}
    return found


def complete(given: Answers, *, asks: bool) -> Answers:
    """Fill in what was not given: from the data where they tell, by asking where there is somebody.

    Args:
        given: so far.
        asks: questions are asked, with what was found as the default.

    Raises:
        ConfigError: without asking, a column that is needed cannot be found.
        DataError: the data cannot be opened.
    """
    model = given.model or _asked("Model (hub id or directory)", DEFAULT_MODEL)
    data = given.data or _asked("Data (directory of .tar shards, .jsonl file, or a name on the hub)", "data/train")
    columns, there = dict(given.columns), []
    index_dir = Path("runs/index")
    try:
        there = look(data, given.media_root, index_dir)
    except DataError:
        if not asks:
            raise
        print(f"{data} cannot be opened here; its columns are as you say")  # noqa: T201 - a dialogue
    unknown = [name for name in columns.values() if there and name not in there]
    if unknown:
        raise ConfigError(f"{data} has no column {', '.join(unknown)}; it has: {', '.join(there)}")
    found = {**guess(there), **columns}
    if "messages" in columns:
        found = {kind: column for kind, column in found.items() if kind not in ("question", "answer")}
    if asks:
        found = _columns_by_asking(there, found)
    elif "messages" not in found and not {"question", "answer"} <= set(found):
        missing = [f"--{kind}-column" for kind in ("question", "answer") if kind not in found]
        raise ConfigError(f"{data} has the columns {', '.join(there)}: say which is meant with {', '.join(missing)}")
    name = Path(data.rstrip("/")).name.split(".")[0] or "run"
    output_dir = given.output_dir or Path(_asked("Output directory", f"runs/{name}") if asks else f"runs/{name}")
    num_gpus = given.num_gpus
    if num_gpus is None:
        num_gpus = int(_asked("GPUs (0: none)", "1")) if asks else 1
    if num_gpus < 0 or (num_gpus > 8 and num_gpus % 8):
        raise ConfigError(f"--gpus {num_gpus}: expected 0 to 8, or a multiple of 8")
    return replace(given, model=model, data=data, columns=found, num_gpus=num_gpus, output_dir=output_dir)


def _columns_by_asking(there: Sequence[str], found: Mapping[str, str]) -> dict[str, str]:
    if there:
        print(f"columns: {', '.join(there)}")  # noqa: T201 - a dialogue
    kinds = ["image", "video", *(["messages"] if "messages" in found else ["question", "answer"])]
    answers = {kind: _asked(f"Column of the {kind} (- for none)", found.get(kind, "-")) for kind in kinds}
    return {kind: column for kind, column in answers.items() if column != "-"}


def _asked(question: str, default: str) -> str:
    from rich.prompt import Prompt

    return str(Prompt.ask(question, default=default))
