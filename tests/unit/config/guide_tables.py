"""The key tables of the guides in configs/: values, defaults and examples are written from the schemas.

    python -m tests.unit.config.guide_tables

rewrites what stands between `<!-- keys: FILE -->` and `<!-- keys: end -->`. A row begins with its key and ends with its
meaning; both are written by hand, what is between them is not.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import annotated_types
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlm_dist.config import SECTIONS
from vlm_dist.config.run import RunFile
from vlm_dist.config.section import Section
from vlm_dist.config.vlm_model import ModelClassEntry

GUIDES = {language: Path(__file__).parents[3] / "configs" / name for language, name in
          {"en": "README.md", "ko": "README.ko.md"}.items()}  # fmt: skip
FILES: dict[str, type[Section]] = {"run": RunFile, **SECTIONS}

_TABLE = re.compile(r"(<!-- keys: (\w+) -->\n)(.*?)(<!-- keys: end -->)", re.DOTALL)
_HEADS = {"en": ("key", "values", "default", "example", "meaning"), "ko": ("키", "값", "기본값", "예", "뜻")}

#: Words of the column of values, where they differ between the languages.
_WORDS = {
    "en": {},
    "ko": {
        "integer": "정수",
        "number": "수",
        "text": "문자열",
        "path": "경로",
        "list": "목록",
        "mapping": "매핑",
        "required": "필수",
        "module": "모듈",
        "size": "크기",
        "condition": "조건",
        "facts": "사실 매핑",
        "metric": "지표",
        "regular expression": "정규식",
        "list of text": "문자열 목록",
        "list of paths": "경로 목록",
        "list of names": "이름 목록",
        "list of integers": "정수 목록",
        "list of metrics": "지표 목록",
        "share < 1, or steps": "1 미만은 비율, 1 이상은 스텝",
        "the example above": "위의 예",
        "as the common ones": "공통 값과 같은 키",
    },
}

#: Keys whose values a function checks, so that the annotation does not tell them.
_CHECKED = {
    "model.model_classes.<id>.import_path": "module",
    "model.model_classes.<id>.loading_params": "as the common ones",
    "model.model_classes.<id>.processor_params": "as the common ones",
    "model.model_classes.<id>.family": "text, facts, `null`",
    "model.loading_params.attn_implementation": "`sdpa`, `eager`, `varlen`, `flash_attention_2`, "
    "`flash_attention_3`, `flex_attention`, `null`",
    "train.max_steps": "`-1`, integer ≥ 1",
    "train.stop_at_step": "share < 1, or steps; `null`",
    "train.logging_steps": "share < 1, or steps; 0",
    "train.eval_steps": "share < 1, or steps; 0",
    "train.save_steps": "share < 1, or steps; 0",
    "train.save_keep_steps": "share < 1, or steps; 0",
    "train.metric_for_best_model": "metric, `null`",
    "train.eval_metrics": "list of metrics",
    "train.resume": "`false`, `auto`, path",
    "train.gradient_checkpointing_policy.language": "`all`, `none`, integer ≥ 0, `every-K`",
    "train.gradient_checkpointing_policy.vision": "`all`, `none`, integer ≥ 0, `every-K`",
    "train.report_to": "`wandb`, `tensorboard`, `none`, list",
    "peft.target_modules": "`all-linear`, list of names, regular expression",
    "data.cache.max_size": "size",
    "data.train[].path": "path, URL, list of paths, `null`",
    "data.eval[].path": "path, URL, list of paths, `null`",
    "data.train[].where": "condition",
    "data.train[].data_files": "path, list of paths, mapping, `null`",
}

#: One value each that is no default; keys that are not here are switches and choices, which have one by themselves.
EXAMPLES: dict[str, str] = {
    "run.model": "Qwen/Qwen2-VL-2B-Instruct",
    "run.configs.model": "my_model_config.yaml",
    "run.configs.collator": "my_collator_config.yaml",
    "run.configs.train": "my_train_config.yaml",
    "run.configs.peft": "my_peft_config.yaml",
    "run.configs.data": "my_data_config.yaml",
    "run.deepspeed": "../ds_configs/zero3.json",
    "run.overrides": "{train: {seed: 1}}",
    "model.model_classes": "{my/model: {}}",
    "model.model_classes.<id>.model_class": "LlavaForConditionalGeneration",
    "model.model_classes.<id>.processor_class": "LlavaProcessor",
    "model.model_classes.<id>.import_path": "my_package.models",
    "model.model_classes.<id>.loading_params": "{revision: main}",
    "model.model_classes.<id>.processor_params": "{max_pixels: 501760}",
    "model.model_classes.<id>.family": "llava",
    "model.loading_params.attn_implementation": "sdpa",
    "model.loading_params.revision": "main",
    "model.processor_params.new_special_tokens": '["<box>"]',
    "collator.dataset_columns.image_column": "image_path",
    "collator.dataset_columns.question_column": "query",
    "collator.dataset_columns.answer_column": "response",
    "collator.dataset_columns.video_column": "video_path",
    "collator.dataset_columns.context_column": "caption",
    "collator.dataset_columns.messages_column": "conversations",
    "collator.message_format.system_prompt": "Answer with one word.",
    "collator.message_format.training_messages": "[{role: assistant, content: [{type: image}]}]",
    "collator.message_format.training_messages[].content": "[{type: image}]",
    "collator.message_format.training_messages[].content[].text": '"{question_column}"',
    "collator.image_processing.max_size": "1024",
    "collator.video_processing.frame_extraction.sampling_strategy": "uniform",
    "collator.video_processing.frame_extraction.num_frames": "16",
    "collator.video_processing.file_processing.max_duration": "60.0",
    "collator.text_processing.max_length": "4096",
    "collator.text_processing.pad_to_multiple_of": "64",
    "collator.label_masking.ignore_index": "-1",
    "train.per_device_train_batch_size": "4",
    "train.per_device_eval_batch_size": "4",
    "train.gradient_accumulation_steps": "4",
    "train.learning_rate": "1.0e-4",
    "train.num_train_epochs": "0.5",
    "train.max_steps": "1000",
    "train.warmup_ratio": "0.1",
    "train.warmup_steps": "100",
    "train.weight_decay": "0.01",
    "train.adam_beta1": "0.95",
    "train.adam_beta2": "0.99",
    "train.adam_epsilon": "1.0e-6",
    "train.max_grad_norm": "0.5",
    "train.max_nonfinite_steps": "3",
    "train.seed": "7",
    "train.logging_steps": "10",
    "train.eval_steps": "500",
    "train.save_steps": "500",
    "train.save_total_limit": "null",
    "train.save_keep_steps": "5000",
    "train.metric_for_best_model": "eval_loss",
    "train.early_stopping_patience": "3",
    "train.early_stopping_threshold": "0.001",
    "train.generation_max_new_tokens": "128",
    "train.eval_metrics": "[exact_match, anls]",
    "train.output_dir": "runs/vqa",
    "train.resume": "auto",
    "train.resume_anyway": "[data]",
    "train.stop_at_step": "0.5",
    "train.gradient_checkpointing_policy.language": "every-2",
    "train.gradient_checkpointing_policy.vision": "none",
    "train.pack_max_tokens": "16384",
    "train.pack_max_patches": "20000",
    "train.dataloader_num_workers": "8",
    "train.dataloader_prefetch_factor": "4",
    "train.report_to": "[wandb, tensorboard]",
    "train.run_name": "vqa-r32",
    "train.wandb_project": "vqa",
    "train.wandb_entity": "my-team",
    "train.wandb_group": "ranks",
    "train.wandb_tags": "[vqa, r32]",
    "train.wandb_notes": "Half the rank of the first run.",
    "train.device_peak_tflops": "989",
    "train.profile": "{start_step: 10}",
    "train.profile.start_step": "20",
    "train.profile.num_steps": "5",
    "train.profile.ranks": "[0, 1]",
    "train.hang_timeout_minutes": "60",
    "train.gc_steps": "0",
    "peft.task_type": "CAUSAL_LM",
    "peft.r": "32",
    "peft.target_modules": "[q_proj, v_proj]",
    "peft.lora_alpha": "8",
    "peft.lora_dropout": "0.0",
    "peft.modules_to_save": "[lm_head]",
    "peft.adapter": "runs/first/adapter",
    "peft.towers_learning_rate.vision": "2.0e-6",
    "peft.towers_learning_rate.projector": "1.0e-5",
    "peft.towers_learning_rate.language": "1.0e-5",
    "data.train": "[{type: tar, path: data/train}]",
    "data.eval": "[{type: jsonl, path: heldout.jsonl}]",
    "data.train[].name": "vqa",
    "data.train[].path": "data/vqa",
    "data.train[].split": "train",
    "data.train[].data_files": "train-*.parquet",
    "data.train[].repeat": "0.5",
    "data.train[].weight": "3.0",
    "data.train[].media_root": "/data/images",
    "data.train[].columns": "{question: query}",
    "data.train[].max_samples": "1000",
    "data.train[].where": '{image_width: ">= 224"}',
    "data.train[].subset": "{share: 0.1}",
    "data.train[].subset.share": "0.1",
    "data.train[].subset.seed": "1",
    "data.index_dir": "/scratch/index",
    "data.cache.dir": "/local_nvme/cache",
    "data.cache.max_size": "500GiB",
    "data.cache.lookahead_steps": "128",
    "data.sample_timeout_seconds": "120.0",
    "data.worker_memory_gib": "8.0",
    "data.max_bad_share": "0.01",
}


@dataclass(frozen=True)
class Key:
    """A key of a file.

    Attributes:
        schema: that has it as a field; what an example of it is tried with.
    """

    path: str
    field: FieldInfo
    schema: type[Section]

    @property
    def name(self) -> str:
        """The path without its file."""
        return self.path.partition(".")[2]


def keys(file: str) -> list[Key]:
    """Every key of a file, in the schema's order."""
    return list(_walk(FILES[file], file))


def _walk(schema: type[Section], above: str) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        path = f"{above}.{name}"
        section, ending = _section_in(field.annotation)
        if section is None or (schema is ModelClassEntry and name != "family") or path == "data.eval":
            yield Key(path, field, schema)
        else:
            if ending or _is_optional(field.annotation):
                yield Key(path, field, schema)
            yield from _walk(section, path + ending)


def _section_in(annotation: Any) -> tuple[type[Section] | None, str]:
    """The schema of what a field holds, and how a path goes on into it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    arguments = [one for one in typing.get_args(annotation) if one is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is dict:
        return (found, ".<id>") if (found := _section_in(arguments[-1])[0]) else (None, "")
    if origin is tuple:
        return (found, "[]") if (found := _section_in(arguments[0])[0]) else (None, "")
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for one in arguments:
            if (found := _section_in(one))[0] is not None:
                return found
    return None, ""


def _is_optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def values_of(key: Key) -> list[str]:
    """What may stand there, in English."""
    if key.path in _CHECKED:
        return [_CHECKED[key.path]]
    return list(dict.fromkeys(_values(key.field.annotation, key.field.metadata)))


def _values(annotation: Any, metadata: list[Any]) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _values(arguments[0], [*metadata, *arguments[1:]])
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from _values(one, metadata)
    elif origin is typing.Literal:
        yield from (f"`{_yaml(one)}`" for one in arguments)
    elif annotation is bool:
        yield from ("`true`", "`false`")
    elif annotation is type(None):
        yield "`null`"
    elif annotation in (int, float):
        yield ("integer" if annotation is int else "number") + _bounds(metadata)
    elif annotation is str:
        yield "text"
    elif annotation is Path:
        yield "path"
    elif origin is tuple:
        inner = list(_values(arguments[0], []))
        plain = {"text": "list of text", "integer ≥ 0": "list of integers"}.get(inner[0] if len(inner) == 1 else "")
        yield plain or ("list" if _section_in(annotation)[0] else f"list: {', '.join(inner)}")
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        yield "mapping"
    else:
        raise AssertionError(annotation)


def _bounds(metadata: list[Any]) -> str:
    kinds = ((annotated_types.Gt, "gt", ">"), (annotated_types.Ge, "ge", "≥"), (annotated_types.Lt, "lt", "<"),
             (annotated_types.Le, "le", "≤"))  # fmt: skip
    found = []
    for one in metadata:
        for inner in one.metadata if isinstance(one, FieldInfo) else [one]:
            found += [f" {sign} {getattr(inner, name):g}" for kind, name, sign in kinds if isinstance(inner, kind)]
    return ",".join(found)


def default_of(key: Key) -> str:
    """As YAML writes it; `required` where there is none."""
    default = key.field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if key.name == "message_format.training_messages":
        return "the example above"
    if default in ((), {}):
        return "`{}`" if default == {} else "`[]`"
    return f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float):
        return f"{value:g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def example_of(key: Key) -> str:
    """A value as it is written in the file; where nothing is in the table, another choice than the default."""
    if key.path in EXAMPLES:
        return EXAMPLES[key.path]
    default = key.field.get_default(call_default_factory=True)
    for choice in (one.strip("`") for one in values_of(key)):
        if choice not in ("text", "path", "null") and default != yaml.safe_load(choice):
            return choice
    raise AssertionError(f"{key.path} has no example in {__file__}")


def row(key: Key, meaning: str, language: str) -> str:
    """A line of the table."""
    values = ", ".join(_translated(one, language) for one in values_of(key))
    default = _translated(default_of(key), language)
    cells = (f"`{key.name}`", values, default, f"`{example_of(key)}`", meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _translated(text: str, language: str) -> str:
    for word, other in sorted(_WORDS[language].items(), key=lambda pair: -len(pair[0])):
        text = re.sub(rf"(?<![\w`-]){re.escape(word)}(?![\w`-])", other, text)
    return text


def tables(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(file, [(key, meaning)]) of every table of a guide."""
    found = []
    for match in _TABLE.finditer(text):
        lines = [line for line in match[3].splitlines() if line.startswith("| `")]
        rows = [
            (cells[1].strip().strip("`"), cells[-2].strip()) for cells in (re.split(r"(?<!\\)\|", one) for one in lines)
        ]
        found.append((match[2], rows))
    return found


def rewritten(text: str, language: str) -> str:
    """The guide with its tables as the schemas have them; keys that are in no schema stay as they are."""

    def table(match: re.Match[str]) -> str:
        known = {key.name: key for key in keys(match[2])}
        [(_, rows)] = tables(match[0])
        head = _HEADS[language]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [row(known[n], m, language) if n in known else f"| `{n}` | {m} |" for n, m in unescaped(rows)]
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return _TABLE.sub(table, text)


def unescaped(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows as they are meant, without the marks that a table needs."""
    return [(name, meaning.replace("\\|", "|")) for name, meaning in rows]


def main() -> None:
    """Rewrite both guides."""
    for language, path in GUIDES.items():
        path.write_text(rewritten(path.read_text(encoding="utf-8"), language), encoding="utf-8")


if __name__ == "__main__":
    main()
