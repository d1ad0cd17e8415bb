"""Every key of every file: its default, a value of the wrong type, and a misspelled name.

The cases come from the schemas themselves, so no key can be forgotten; the table of defaults is written by hand, so
none can change unnoticed.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.config.conftest import REPOSITORY, Project
from vlm_dist.config import SECTIONS, TrainConfig, VlmCollatorConfig
from vlm_dist.config.data import DataSource
from vlm_dist.config.section import Section
from vlm_dist.config.vlm_collator import ContentPart, Message
from vlm_dist.config.vlm_model import ModelClassEntry

DEFAULTS: dict[str, Any] = {
    "model.model_classes": {},
    "model.loading_params.torch_dtype": "torch.bfloat16",
    "model.loading_params.device_map": "auto",
    "model.loading_params.trust_remote_code": False,
    "model.loading_params.attn_implementation": None,
    "model.loading_params.revision": None,
    "model.processor_params.trust_remote_code": False,
    "model.processor_params.new_special_tokens": [],
    "collator.dataset_columns.image_column": "image",
    "collator.dataset_columns.question_column": "question",
    "collator.dataset_columns.answer_column": "answer",
    "collator.dataset_columns.video_column": "video",
    "collator.dataset_columns.context_column": None,
    "collator.dataset_columns.messages_column": None,
    "collator.data_processing.image_data": True,
    "collator.data_processing.video_data": False,
    "collator.message_format.system_prompt": "Answer briefly.",
    "collator.message_format.training_messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "{system_prompt}"},
                {"type": "image", "text": None},
                {"type": "text", "text": "{question_column}"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]},
    ],
    "collator.image_processing.convert_to_rgb": True,
    "collator.image_processing.resize_mode": "keep_aspect",
    "collator.image_processing.max_size": None,
    "collator.video_processing.enabled": True,
    "collator.video_processing.frame_extraction.library": "decord",
    "collator.video_processing.frame_extraction.sampling_strategy": "uniform",
    "collator.video_processing.frame_extraction.num_frames": 8,
    "collator.video_processing.file_processing.convert_to_rgb": True,
    "collator.video_processing.file_processing.max_duration": None,
    "collator.text_processing.padding": True,
    "collator.text_processing.truncation": True,
    "collator.text_processing.max_length": 2048,
    "collator.text_processing.pad_to_multiple_of": None,
    "collator.text_processing.add_generation_prompt": False,
    "collator.label_masking.mask_pad_token": True,
    "collator.label_masking.mask_image_token": True,
    "collator.label_masking.mask_input_tokens": False,
    "collator.label_masking.ignore_index": -100,
    "train.per_device_train_batch_size": 8,
    "train.per_device_eval_batch_size": 8,
    "train.gradient_accumulation_steps": 2,
    "train.learning_rate": 1e-5,
    "train.num_train_epochs": 1.0,
    "train.max_steps": -1,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.03,
    "train.warmup_steps": 0,
    "train.weight_decay": 0.0,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-8,
    "train.max_grad_norm": 1.0,
    "train.nonfinite_steps": "skip",
    "train.max_nonfinite_steps": 10,
    "train.seed": 42,
    "train.logging_steps": 0.1,
    "train.eval_steps": 0.1,
    "train.save_steps": 0.1,
    "train.save_total_limit": 2,
    "train.save_keep_steps": 0,
    "train.metric_for_best_model": None,
    "train.greater_is_better": None,
    "train.early_stopping_patience": None,
    "train.early_stopping_threshold": 0.0,
    "train.load_best_model_at_end": False,
    "train.save_in_slices": "auto",
    "train.eval_on_start": False,
    "train.predict_with_generate": False,
    "train.generation_max_new_tokens": 32,
    "train.eval_metrics": ["exact_match"],
    "train.output_dir": "runs/default",
    "train.resume": False,
    "train.resume_anyway": [],
    "train.stop_at_step": None,
    "train.gradient_checkpointing": True,
    "train.gradient_checkpointing_policy.language": "all",
    "train.gradient_checkpointing_policy.vision": "all",
    "train.torch_compile": False,
    "train.torch_compile_backend": "inductor",
    "train.memory_check": "auto",
    "train.bf16": True,
    "train.fp16": False,
    "train.group_by_length": True,
    "train.packing": False,
    "train.pack_max_tokens": None,
    "train.pack_max_patches": None,
    "train.balance_scope": "world",
    "train.remove_unused_columns": False,
    "train.dataloader_pin_memory": False,
    "train.dataloader_num_workers": 2,
    "train.dataloader_prefetch_factor": 2,
    "train.report_to": ["wandb"],
    "train.run_name": None,
    "train.wandb_project": "vlm-dist",
    "train.wandb_entity": None,
    "train.wandb_group": None,
    "train.wandb_tags": [],
    "train.wandb_notes": None,
    "train.wandb_artifacts": "none",
    "train.device_peak_tflops": None,
    "train.profile": None,
    "train.hang_timeout_minutes": 20,
    "train.gc_steps": 50,
    "train.debug_collectives": False,
    "train.sample_ledger": False,
    "peft.task_type": "CAUSAL_LM",
    "peft.r": 64,
    "peft.target_modules": "all-linear",
    "peft.lora_alpha": 16,
    "peft.lora_dropout": 0.05,
    "peft.bias": "none",
    "peft.use_rslora": False,
    "peft.use_dora": False,
    "peft.modules_to_save": [],
    "peft.quantization": "none",
    "peft.adapter": None,
    "peft.towers.vision": "lora",
    "peft.towers.projector": "lora",
    "peft.towers.language": "lora",
    "peft.towers_learning_rate.vision": None,
    "peft.towers_learning_rate.projector": None,
    "peft.towers_learning_rate.language": None,
    "data.train": [],
    "data.eval": [],
    "data.index_dir": "runs/index",
    "data.lengths": "auto",
    "data.cache.dir": None,
    "data.cache.max_size": "200GB",
    "data.cache.mode": "auto",
    "data.cache.lookahead_steps": 64,
    "data.cache.stage_files": False,
    "data.sample_timeout_seconds": 60.0,
    "data.worker_memory_gib": 4.0,
    "data.max_bad_share": 0.05,
}

FILES = {
    "model": "vlm_model_config.yaml",
    "collator": "vlm_collator_config.yaml",
    "train": "train_config.yaml",
    "peft": "peft_config.yaml",
    "data": "data_config.yaml",
}

#: What the shipped files set for an example, so that it is no default.
EXAMPLES = {"model.model_classes", "data.train"}


def keys(schema: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
    """(dotted key, schema that has it) of all keys that are no sections themselves."""
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from keys(annotation, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", schema


ALL_KEYS = dict(item for name, schema in SECTIONS.items() for item in keys(schema, name))


def value_at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree


def test_the_table_of_defaults_has_every_key() -> None:
    assert set(DEFAULTS) == set(ALL_KEYS)


@pytest.mark.parametrize("key", ALL_KEYS)
def test_default(key: str) -> None:
    section, _, rest = key.partition(".")
    assert value_at(SECTIONS[section]().model_dump(mode="json"), rest) == DEFAULTS[key]


@pytest.mark.parametrize("key", sorted(set(ALL_KEYS) - EXAMPLES))
def test_the_shipped_file_shows_the_key_with_its_default(key: str) -> None:
    section, _, rest = key.partition(".")
    shown = value_at(yaml.safe_load((REPOSITORY / "configs" / FILES[section]).read_text()), rest)
    default = DEFAULTS[key]
    if key == "collator.message_format.training_messages":
        default = [
            {**m, "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
            for m in default
        ]
    assert shown == default


def wrong_value(key: str) -> str:
    """YAML that the key cannot be: a mapping is nothing's value, but a mapping's."""
    return "[1]" if key in ("model.model_classes", "train.profile") else "{a: {b: 1}}"


@pytest.mark.parametrize("key", ALL_KEYS)
def test_wrong_type_names_the_key_and_what_it_wants(project: Project, key: str) -> None:
    problems = project.problems(f"{key}={wrong_value(key)}")
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"--set {key}={wrong_value(key)}: {key}: got ")
    assert "not yet supported" in problems[0] or ", expected " in problems[0]
    assert "something else" not in problems[0]


@pytest.mark.parametrize("key", ALL_KEYS)
def test_null_is_refused_where_there_is_no_such_value(project: Project, key: str) -> None:
    nullable = type(None) in typing.get_args(ALL_KEYS[key].model_fields[key.rpartition(".")[2]].annotation)
    reads_null = {
        "collator.dataset_columns.image_column": "beside data_processing.image_data",
        "collator.dataset_columns.question_column": "uses {question_column}",
        "collator.dataset_columns.answer_column": "uses {answer_column}",
        "collator.message_format.system_prompt": "uses {system_prompt}",
    }
    if nullable and key not in reads_null:
        assert value_at(project.load(f"{key}=null").dump(), key) is None
    else:
        assert reads_null.get(key, f"{key}: got null") in "\n".join(project.problems(f"{key}=null"))


@pytest.mark.parametrize("key", [k for k in ALL_KEYS if "dataset_columns" not in k and "processor_params" not in k])
def test_misspelled_name_is_refused_with_the_right_one(project: Project, key: str) -> None:
    parent, _, name = key.rpartition(".")
    misspelled = f"{parent}.{name[0]}{name[2:]}" if len(name) > 3 else f"{parent}.{name}x"
    problems = project.problems(f"{misspelled}=1")
    assert any(line.startswith(f"--set {misspelled}=1: {misspelled}: got an unknown key") for line in problems)
    if name != "r":  # a name of one letter is near to nothing
        assert any(f"did you mean {name}?" in line for line in problems), problems


@pytest.mark.parametrize("schema", [DataSource, Message, ContentPart, ModelClassEntry])
def test_items_of_lists_are_strict_too(schema: type[Section], project: Project) -> None:
    place, valid = {
        DataSource: ("data.train[0]", "type: tar, path: x"),
        Message: ("collator.message_format.training_messages[1]", "role: assistant, content: [{type: text, text: x}]"),
        ContentPart: ("collator.message_format.training_messages[0].content[0]", "type: text, text: x"),
        ModelClassEntry: ("model.model_classes.mine", "model_class: A, processor_class: B, import_path: c"),
    }[schema]
    for name in schema.model_fields:
        problems = project.problems(f"{place}={{{valid}, {name}x: 1}}")
        assert any(f"{place}.{name}x: got an unknown key; did you mean {name}?" in line for line in problems), problems


BAD_NUMBERS = {
    "train.per_device_train_batch_size": ["0", "-1", "2.5", "true"],
    "train.per_device_eval_batch_size": ["0"],
    "train.gradient_accumulation_steps": ["0"],
    "train.learning_rate": ["0", "-1e-5", ".nan", ".inf"],
    "train.num_train_epochs": ["0"],
    "train.max_steps": ["0", "-2"],
    "train.warmup_ratio": ["1", "-0.1"],
    "train.warmup_steps": ["-1", "0.5"],
    "train.weight_decay": ["-0.1"],
    "train.adam_beta1": ["1"],
    "train.adam_beta2": ["1.5"],
    "train.adam_epsilon": ["0"],
    "train.max_grad_norm": ["-1"],
    "train.logging_steps": ["-0.1", "1.5"],
    "train.stop_at_step": ["0", "2.5"],
    "train.save_total_limit": ["0"],
    "train.save_keep_steps": ["-1", "1.5"],
    "train.metric_for_best_model": ["eval_f1", "images/", "7"],
    "train.early_stopping_patience": ["0", "1.5"],
    "train.early_stopping_threshold": ["-0.1"],
    "train.eval_metrics": ["[]", "[f1]", "7"],
    "train.save_in_slices": ["always", "2"],
    "train.dataloader_num_workers": ["-1"],
    "train.device_peak_tflops": ["0", "-989"],
    "train.profile.start_step": ["0"],
    "train.profile.num_steps": ["0", "101"],
    "train.dataloader_prefetch_factor": ["0"],
    "train.generation_max_new_tokens": ["0"],
    "peft.r": ["0"],
    "peft.lora_alpha": ["0"],
    "peft.lora_dropout": ["1", "-0.1"],
    "peft.towers_learning_rate.vision": ["0", "-1e-5"],
    "collator.text_processing.max_length": ["0"],
    "collator.text_processing.pad_to_multiple_of": ["0", "1.5"],
    "collator.label_masking.ignore_index": ["0", "7", "-1.5"],
    "collator.image_processing.max_size": ["0"],
    "collator.video_processing.frame_extraction.num_frames": ["0"],
    "collator.video_processing.file_processing.max_duration": ["0"],
    "train.pack_max_tokens": ["0"],
    "train.pack_max_patches": ["0"],
    "data.train[0].repeat": ["0"],
    "data.train[0].weight": ["0"],
    "data.train[0].subset.share": ["0", "1.5"],
    "data.train[0].max_samples": ["0"],
    "data.sample_timeout_seconds": ["0", "181"],
    "data.worker_memory_gib": ["0"],
    "data.max_bad_share": ["-0.1", "5"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in BAD_NUMBERS.items() for v in values])
def test_numbers_out_of_range(project: Project, key: str, value: str) -> None:
    problems = project.problems(f"{key}={value}")
    assert len(problems) == 1
    assert f": {key}: got " in problems[0]
    assert ", expected " in problems[0]


NOT_YET = {
    "train.report_to": "[mlflow]",
    "peft.rank_pattern": "{a: 1}",
}


@pytest.mark.parametrize(("key", "value"), NOT_YET.items())
def test_what_is_not_built_is_refused(project: Project, key: str, value: str) -> None:
    problems = project.problems(f"{key}={value}")
    assert len(problems) == 1
    assert "not yet supported" in problems[0]


ACCEPTED = {
    "train.report_to": [
        ("none", []),
        ("[none]", []),
        ("wandb", ["wandb"]),
        ("[]", []),
        ("tensorboard", ["tensorboard"]),
    ],
    "train.resume": [("auto", "auto"), ("false", False), ("runs/a/checkpoint-5", "runs/a/checkpoint-5")],
    "train.logging_steps": [("5", 5), ("0", 0), ("0.25", 0.25), ("1.0", 1)],
    "train.stop_at_step": [("0.5", 0.5), ("100", 100)],
    "train.max_steps": [("-1", -1), ("7", 7)],
    "train.save_total_limit": [("null", None)],
    "train.save_keep_steps": [("0.5", 0.5), ("500", 500)],
    "train.metric_for_best_model": [(v, v) for v in ("eval_loss", "exact_match", "images/loss", "eval_images/loss")],
    "train.eval_metrics": [("anls", ["anls"]), ("[anls, wer, anls]", ["anls", "wer"])],
    "train.greater_is_better": [("true", True)],
    "train.save_in_slices": [("true", True), ("auto", "auto")],
    "train.learning_rate": [("1e-5", 1e-5), ("1", 1)],
    "peft.target_modules": [
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (r"'.*language.*\.q_proj'", r".*language.*\.q_proj"),
    ],
    "peft.bias": [("lora_only", "lora_only")],
    "peft.towers.vision": [("full", "full")],
    "peft.towers_learning_rate.projector": [("1e-5", 1e-5)],
    "peft.modules_to_save": [("[lm_head]", ["lm_head"])],
    "model.processor_params.new_special_tokens": [("[<box>]", ["<box>"])],
    "peft.quantization": [("nf4", "nf4")],
    "peft.adapter": [("runs/a/adapter", "runs/a/adapter")],
    "peft.use_dora": [("true", True)],
    "model.loading_params.torch_dtype": [(v, v) for v in ("torch.bfloat16", "bfloat16", "torch.float32", "float32")],
    "model.loading_params.attn_implementation": [(v, v) for v in ("sdpa", "varlen", "org/kernel")],
    "collator.label_masking.mask_image_token": [("false", False)],
    "collator.text_processing.truncation": [("false", False)],
    "collator.image_processing.resize_mode": [("crop", "crop"), ("stretch", "stretch")],
    "data.train[0].columns": [("{question: query}", {"question": "query"})],
    "data.train[0].repeat": [("0.5", 0.5), ("2", 2)],
    "data.train[0].where": [
        ("{image_width: '>= 2'}", {"image_width": ">= 2"}),
        ("{a: ['> 1', '< 3']}", {"a": ["> 1", "< 3"]}),
    ],
    "data.train[0].subset": [("{share: 0.5}", {"share": 0.5, "seed": 0}), ("null", None)],
}

#: What else has to be set for a value to make sense.
BESIDE = {
    "train.metric_for_best_model": ["data.eval=[{type: tar, path: heldout}]", "train.predict_with_generate=true"],
}


@pytest.mark.parametrize(
    ("key", "written", "read"), [(key, written, read) for key, cases in ACCEPTED.items() for written, read in cases]
)
def test_what_is_accepted(project: Project, key: str, written: str, read: Any) -> None:
    dumped = project.load(*BESIDE.get(key, ()), f"{key}={written}").dump()
    assert value_at(dumped, key.replace("[0]", "")) == read if "[0]" not in key else True
    if "[0]" in key:
        assert dumped["data"]["train"][0][key.rpartition(".")[2]] == read


def test_any_argument_of_the_processor_may_be_given(project: Project) -> None:
    config = project.load("model.processor_params.min_pixels=3136", "model.processor_params.size={height: 4, width: 4}")
    assert config.model.processor_params.arguments == {"min_pixels": 3136, "size": {"height": 4, "width": 4}}


def test_every_key_is_explained_in_the_shipped_file() -> None:
    """A key without a comment on its line has one above its group; this only guards against files without comments."""
    for name in FILES.values():
        lines = (REPOSITORY / "configs" / name).read_text().splitlines()
        assert sum("#" in line for line in lines) >= 5, name


def test_precision_follows_the_switches() -> None:
    assert TrainConfig().precision == "bfloat16"
    assert TrainConfig(bf16=False, fp16=True).precision == "float16"
    assert TrainConfig(bf16=False).precision == "float32"


def test_required_columns_are_those_that_a_sample_must_have() -> None:
    assert VlmCollatorConfig().required_columns == {
        "image_column": "image",
        "question_column": "question",
        "answer_column": "answer",
    }


def test_values_cannot_be_changed(project: Project) -> None:
    config = project.load()
    with pytest.raises(ValueError, match="frozen"):
        config.train.learning_rate = 1.0  # type: ignore[misc]
    assert Path("runs/default") == config.train.output_dir
