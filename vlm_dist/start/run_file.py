"""Writes a run file: what differs from the five files, and the command that runs it."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

import vlm_dist
from vlm_dist.config import load_run
from vlm_dist.config.run import ConfigFiles
from vlm_dist.errors import ConfigError
from vlm_dist.start.answers import Answers, source_of

#: The project's own files, which a run file names.
_PROJECT = Path(vlm_dist.__file__).parent.parent
_GPUS_OF_A_NODE = 8
_HEAD = """\
# {command}
#
# Only what differs from the five files is written here. Look at it first:
#   vlm-dist check {path}
#   vlm-dist preview {path}
"""


def write_run_file(path: Path, answers: Answers) -> str:
    """Write a run file, and copies of the files that it names where there are none beside it.

    Args:
        path: of the run file.
        answers: complete.

    Returns:
        The command that runs it.

    Raises:
        ConfigError: the file cannot be written, or would not be sound.
    """
    command = command_of(path, answers.num_gpus or 0)
    fresh = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        deepspeed = _bring_files(path.parent)
        content = _content(answers, deepspeed)
        fresh.write_text(_HEAD.format(command=command, path=shlex.quote(str(path))) + _yaml(content), encoding="utf-8")
        load_run(fresh)  # what is written is what runs
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it was never there
            fresh.unlink()
    return command


def command_of(path: Path, num_gpus: int) -> str:
    """What runs it on so many GPUs."""
    file = shlex.quote(str(path))
    if num_gpus > _GPUS_OF_A_NODE:
        return f"RUN_FILE={file} sbatch --nodes={num_gpus // _GPUS_OF_A_NODE} slurm/train.sbatch"
    if num_gpus > 1:
        return f"deepspeed --num_gpus {num_gpus} -m vlm_dist.train --config {file}"
    return f"python -m vlm_dist.train --config {file}"


def _bring_files(directory: Path) -> str:
    """Have the five files and DeepSpeed's presets where a run file looks for them; where those are, from there."""
    for file in ConfigFiles().model_dump().values():
        if not (directory / file).exists():
            shutil.copyfile(_PROJECT / "configs" / file, directory / file)
    for presets in (directory.parent / "ds_configs", directory / "ds_configs"):
        if (presets / "zero2.json").exists():
            return os.path.relpath(presets, directory)
    shutil.copytree(_PROJECT / "ds_configs", directory / "ds_configs")
    return "ds_configs"


def _content(answers: Answers, deepspeed: str) -> dict[str, Any]:
    columns = dict(answers.columns)
    has = {kind: kind in columns for kind in ("image", "video")}
    stage = "zero1.json" if (answers.num_gpus or 0) > _GPUS_OF_A_NODE else "zero2.json"
    collator: dict[str, Any] = {
        "dataset_columns": {f"{kind}_column": column for kind, column in columns.items()},
        "data_processing": {"image_data": has["image"], "video_data": has["video"]},
        "label_masking": {"mask_input_tokens": True},
    }
    if "messages" not in columns:
        collator["message_format"] = {"training_messages": _messages(has)}
    held_out = [] if answers.eval_data is None else [source_of(answers.eval_data, answers.media_root)]
    train: dict[str, Any] = {"output_dir": str(answers.output_dir), "learning_rate": 1.0e-4, "resume": "auto"}
    if not answers.num_gpus:
        train["report_to"] = "none"
    return {
        "model": answers.model,
        "deepspeed": f"{deepspeed}/{stage}",
        "overrides": {
            "collator": collator,
            "train": train,
            "data": {"train": [source_of(str(answers.data), answers.media_root)], "eval": held_out},
        },
    }


def _messages(has: dict[str, bool]) -> list[dict[str, Any]]:
    user: list[dict[str, Any]] = [{"type": "text", "text": "{system_prompt}"}]
    user += [{"type": kind} for kind in ("image", "video") if has[kind]]
    user.append({"type": "text", "text": "{question_column}"})
    answer = [{"type": "text", "text": "{answer_column}"}]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
