"""Laws between keys: what is refused, what is only said, and what must be left in peace."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.config.conftest import Project

ONLY_VIDEO = ("collator.data_processing.image_data=false", "collator.data_processing.video_data=true")
MESSAGES = "collator.message_format.training_messages"


def messages(*content: str) -> str:
    assistant = "{role: assistant, content: [{type: text, text: '{answer_column}'}]}"
    return f"{MESSAGES}=[{{role: user, content: [{', '.join(content)}]}}, {assistant}]"


TEXT, IMAGE, VIDEO = "{type: text, text: '{question_column}'}", "{type: image}", "{type: video}"

REFUSED: dict[str, tuple[list[str], str]] = {
    "the best adapter by nothing": (
        ["train.wandb_artifacts=best"],
        "train.wandb_artifacts: best needs metric_for_best_model",
    ),
    "JSON lines over the network": (
        ["data.train=[{type: jsonl, path: 'https://host/rows.jsonl'}]"],
        "data.train[0].path: got a URL, expected a local path: over the network only tar shards are read, not jsonl",
    ),
    "URLs and local paths in one source": (
        ["data.train=[{type: tar, path: ['s3://bucket/a.tar', 'data/b.tar']}]"],
        "data.train[0].path: got URLs and local paths in one list; make them two sources",
    ),
    "several directories of save_to_disk": (
        ["data.train=[{type: hf, path: [a, b]}]"],
        "data.train[0].path: got a list, expected one directory; data_files may be a list",
    ),
    "copies of files in a mode without copies": (
        ["data.cache.mode=range", "data.cache.stage_files=true"],
        "data.cache.stage_files: got true beside mode: range, which copies nothing; expected mode: auto or whole",
    ),
    "both precisions": (["train.fp16=true"], "train.fp16: got true beside bf16: true"),
    "bf16 on a float16 model": (
        ["model.loading_params.torch_dtype=torch.float16"],
        "got float16, expected torch.bfloat16 beside train.bf16: true, train.fp16: false; or set train.bf16: false",
    ),
    "fp16 on a bfloat16 model": (
        ["train.bf16=false", "train.fp16=true"],
        "torch_dtype: got bfloat16, expected torch.float16",
    ),
    "float32 training of a bfloat16 model": (["train.bf16=false"], "torch_dtype: got bfloat16, expected torch.float32"),
    "the model's own dtype": (
        ['model.model_classes."Qwen/Qwen2-VL-2B-Instruct".loading_params={torch_dtype: float16}'],
        "Qwen/Qwen2-VL-2B-Instruct.loading_params.torch_dtype: got float16, expected torch.bfloat16",
    ),
    "unknown variable": (
        [messages(IMAGE, "{type: text, text: '{question_colum}'}")],
        "got the unknown variable {question_colum}, expected one of image_column, question_column, answer_column, "
        "video_column, context_column, system_prompt; did you mean {question_column}?",
    ),
    "a column's name instead of its variable": (
        ["collator.dataset_columns.question_column=query", messages(IMAGE, "{type: text, text: '{query}'}")],
        "got the unknown variable {query}",
    ),
    "absent column": (
        [messages(IMAGE, "{type: text, text: '{context_column}'}")],
        "uses {context_column}, but dataset_columns.context_column is null",
    ),
    "image as text": ([messages(IMAGE, "{type: text, text: '{image_column}'}")], "{type: image} in its place"),
    "no system prompt": (["collator.message_format.system_prompt=null"], "system_prompt is null"),
    "misspelled column": (
        ["collator.dataset_columns.contxt_column=c"],
        "contxt_column: got an unknown key that message_format does not use; did you mean context_column?",
    ),
    "text part without text": ([messages(IMAGE, "{type: text}")], "needs its text"),
    "image part with text": ([messages("{type: image, text: x}")], "got a text in a part of type image"),
    "nothing to learn": ([f"{MESSAGES}=[{{role: user, content: [{IMAGE}]}}]"], "no message of role assistant"),
    "image without column": (["collator.dataset_columns.image_column=null"], "beside data_processing.image_data: true"),
    "video without column": (
        [*ONLY_VIDEO, "collator.dataset_columns.video_column=null"],
        "beside data_processing.video_data: true",
    ),
    "video processing off": ([*ONLY_VIDEO, "collator.video_processing.enabled=false"], "set both to the same"),
    "image without place": ([messages(TEXT)], "has no {type: image} part, but image_data is on"),
    "image on, video in the messages": ([messages(VIDEO, TEXT)], "{type: video} is left out while video_data is off"),
    "video without place": ([*ONLY_VIDEO, messages(TEXT)], "has no {type: video} (or image) part"),
    "both without place": (["collator.data_processing.video_data=true", messages(TEXT)], "but both are on"),
    "both off with a place": (["collator.data_processing.image_data=false"], "remove it, or switch one on"),
    "no padding": (["collator.text_processing.padding=false"], "set train.per_device_train_batch_size 8 to 1"),
    "no padding in evaluation": (
        ["collator.text_processing.padding=false", "train.per_device_train_batch_size=1"],
        "set train.per_device_eval_batch_size 8 to 1",
    ),
    "the best without samples": (["train.metric_for_best_model=eval_loss"], "got eval_loss, but data.eval is empty"),
    "the best without evaluations": (
        ["train.metric_for_best_model=eval_loss", "train.eval_steps=0", "data.eval=[{type: tar, path: a}]"],
        "got eval_loss, but eval_steps is 0",
    ),
    "the best without answers": (
        ["train.metric_for_best_model=eval_exact_match", "data.eval=[{type: tar, path: a}]"],
        "got eval_exact_match, which needs predict_with_generate: true",
    ),
    "the best by what is not measured": (
        [
            *("train.metric_for_best_model=images/anls", "data.eval=[{type: tar, path: a}]"),
            "train.predict_with_generate=true",
        ],
        "got images/anls, but eval_metrics has only exact_match: add anls",
    ),
    "patience for what": (["train.early_stopping_patience=3"], "got 3, which needs metric_for_best_model"),
    "the best of what": (["train.load_best_model_at_end=true"], "got true, which needs metric_for_best_model"),
    "the best of one": (
        [
            *("train.metric_for_best_model=eval_loss", "data.eval=[{type: tar, path: a}]"),
            *("train.load_best_model_at_end=true", "train.save_steps=0"),
        ],
        "no checkpoint before the last could be the best",
    ),
    "generation without samples": (["train.predict_with_generate=true"], "data.eval is empty"),
    "all frozen": (["peft.towers={vision: freeze, projector: freeze, language: freeze}"], "nothing to train"),
    "a packed tower in full": (["peft.quantization=nf4", "peft.towers.vision=full"], "cannot be trained in full"),
    "no data": (["data.train=[]"], "data.train: got no source"),
    "tar without path": (["data.train=[{type: tar}]"], "data.train[0]: a source of type tar needs a path"),
    "hf without name": (["data.train=[{type: hf, split: train}]"], "needs a name (of a dataset) or a path"),
    "split of a tar": (["data.train[0].split=train"], "does not apply to a source of type tar"),
    "weights of some sources": (
        ["data.train=[{type: tar, path: a, weight: 1}, {type: tar, path: b}]"],
        "data.train[1].weight: is missing: data.train[0] has one; give all sources a weight, or none",
    ),
    "weight beside repeat": (
        ["data.train=[{type: tar, path: a, weight: 1, repeat: 2}]"],
        "data.train[0].repeat: does not apply beside weight 1",
    ),
    "weight of held-out samples": (["data.eval=[{type: tar, path: a, weight: 2}]"], "data.eval[0].weight: got 2"),
    "condition without sign": (
        ["data.train=[{type: tar, path: a, where: {image_width: '224'}}]"],
        'data.train[0].where: got a mapping, expected a condition such as ">= 224"',
    ),
    "condition on text by size": (
        ["data.train=[{type: tar, path: a, where: {language: '> en'}}]"],
        "expected a number behind >",
    ),
    "kernels without a proof": (["train.use_liger_kernel=true"], "need Triton on a GPU"),
    "sequence parallelism": (["train.sequence_parallel_size=2"], "takes text alone"),
    "compiled blocks with an attention that looks for the padding": (
        ["train.torch_compile=true", "model.loading_params.attn_implementation=flash_attention_2"],
        "train.torch_compile: got true beside attn_implementation: flash_attention_2",
    ),
    "every block but none": (["train.gradient_checkpointing_policy.vision=every-1"], "expected all, none, a number"),
    "data_files of a saved dataset": (
        ["data.eval=[{type: hf, path: saved, data_files: a}]"],
        "data.eval[0].data_files: does not apply beside path",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(only_problem: Callable[..., str], overrides: list[str], message: str) -> None:
    assert message in only_problem(*overrides)


SAID: dict[str, tuple[list[str], str]] = {
    "compiler of nothing": (["train.torch_compile_backend=eager"], "has no effect: torch_compile is false"),
    "device_map": ([], "model.loading_params.device_map: auto has no effect: under DeepSpeed the engine places"),
    "device_map cuda": (["model.loading_params.device_map=cuda"], "cuda has no effect"),
    "no evaluation": ([], "data.eval: no held-out samples"),
    "float32 weights": (
        ["model.loading_params.torch_dtype=float32"],
        "float32 has no effect",
    ),
    "video in the image's place": ([*ONLY_VIDEO], "{type: image} stands for the video"),
    "image left out": ([*ONLY_VIDEO, messages(IMAGE, VIDEO)], "{type: image} is left out: image_data is off"),
    "video left out": ([messages(IMAGE, VIDEO)], "{type: video} is left out: video_data is off"),
    "resize without size": (["collator.image_processing.resize_mode=crop"], "crop has nothing to do: max_size is null"),
    "generation prompt": (["collator.text_processing.add_generation_prompt=true"], "usually false"),
    "policy without checkpointing": (
        ["train.gradient_checkpointing=false", "train.gradient_checkpointing_policy.language=4"],
        "train.gradient_checkpointing_policy: has no effect: gradient_checkpointing is false",
    ),
    "two warm-ups": (["train.warmup_steps=5"], "train.warmup_ratio: has no effect: warmup_steps 5 wins"),
    "packing beats grouping": (["train.packing=true"], "train.group_by_length: has no effect: packing wins"),
    "threshold without patience": (
        ["train.early_stopping_threshold=0.1"],
        "train.early_stopping_threshold: has no effect: early_stopping_patience is null",
    ),
    "metrics of no answers": (
        ["train.eval_metrics=[anls]"],
        "train.eval_metrics: has no effect in training: predict_with_generate is false",
    ),
    "budget without packing": (
        ["train.pack_max_tokens=4096"],
        "train.pack_max_tokens: has no effect: packing is false",
    ),
    "budget below a sample": (
        ["train.packing=true", "train.pack_max_tokens=1024"],
        "1024 is less than text_processing.max_length 2048",
    ),
    "nobody asks for lengths": (
        ["train.group_by_length=false", "data.lengths=exact"],
        "data.lengths: exact has no effect: neither group_by_length nor packing asks for lengths",
    ),
    "no adapter": (
        ["peft.towers={vision: freeze, projector: full, language: full}"],
        "peft.towers: no tower is lora, so there is no adapter: r, target_modules",
    ),
    "rate of a frozen tower": (
        ["peft.towers.vision=freeze", "peft.towers_learning_rate.vision=1e-6"],
        "peft.towers_learning_rate.vision: 1e-06 has no effect: peft.towers.vision is freeze",
    ),
    "unused variable": (["collator.dataset_columns.difficulty=level"], "message_format does not use"),
    "names for a service that is not asked": (
        ["train.report_to=tensorboard", "train.wandb_tags=[mine]"],
        "train.wandb_tags: has no effect: report_to does not name wandb",
    ),
    "adapters for a service that is not asked": (
        ["train.report_to=none", "train.wandb_artifacts=best"],
        "train.wandb_artifacts: has no effect: report_to does not name wandb",
    ),
    "adapters of checkpoints without checkpoints": (
        ["train.save_steps=0", "train.wandb_artifacts=all"],
        "train.wandb_artifacts: all keeps adapters of checkpoints, and save_steps is 0",
    ),
    "nobody prefetches": (
        ["train.dataloader_num_workers=0", "train.dataloader_prefetch_factor=4"],
        "train.dataloader_prefetch_factor: has no effect: with dataloader_num_workers 0",
    ),
    "nobody to watch": (
        ["train.dataloader_num_workers=0", "data.sample_timeout_seconds=30"],
        "data.sample_timeout_seconds: has no effect: train.dataloader_num_workers is 0",
    ),
    "videos in the training process": (
        ["train.dataloader_num_workers=0", *ONLY_VIDEO],
        "train.dataloader_num_workers: 0 decodes videos in the training process",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), SAID.values(), ids=list(SAID))
def test_said(project: Project, overrides: list[str], message: str) -> None:
    assert any(message in notice for notice in project.load(*overrides).notices)


#: Legal and without a word beyond the two that the shipped files have.
QUIET: dict[str, list[str]] = {
    "shipped": [],
    "resize with size": ["collator.image_processing.resize_mode=crop", "collator.image_processing.max_size=448"],
    "float32 throughout": ["train.bf16=false", "model.loading_params.torch_dtype=torch.float32"],
    "float16 throughout": ["train.bf16=false", "train.fp16=true", "model.loading_params.torch_dtype=float16"],
    "text only": ["collator.data_processing.image_data=false", messages(TEXT)],
    "no padding at batch size 1": [
        "collator.text_processing.padding=false",
        "train.per_device_train_batch_size=1",
        "train.per_device_eval_batch_size=1",
    ],
    "packs without padding": [
        "train.packing=true",
        "train.group_by_length=false",
        "collator.text_processing.padding=false",
        "train.per_device_eval_batch_size=1",
    ],
    "own variable": ["collator.dataset_columns.hint=h", messages(IMAGE, "{type: text, text: '{hint}?'}")],
    "no workers": ["train.dataloader_num_workers=0"],
    "video processing off beside video_data off": ["collator.video_processing.enabled=false"],
    "no system prompt, not used": ["collator.message_format.system_prompt=null", messages(IMAGE, TEXT)],
    "JSON in a prompt": [
        f"{MESSAGES}[0].content[2].text='Answer {{question_column}} as {{\"a\": 1}} or {{{{question}}}}'"
    ],
}


@pytest.mark.parametrize("overrides", QUIET.values(), ids=list(QUIET))
def test_quiet(project: Project, overrides: list[str]) -> None:
    assert len(project.load(*overrides).notices) == 2


def test_the_guides_second_scenario(project: Project) -> None:
    """A video model: switch image off, video on, name the column, more frames; nothing else."""
    project.replace("vlm_collator_config.yaml", "image_data: true", "image_data: false")
    project.replace("vlm_collator_config.yaml", "video_data: false", "video_data: true")
    project.replace("vlm_collator_config.yaml", 'video_column: "video"', 'video_column: "video_path"')
    project.replace("vlm_collator_config.yaml", "num_frames: 8", "num_frames: 16")
    collator = project.load().collator
    assert collator.required_columns == {
        "question_column": "question",
        "answer_column": "answer",
        "video_column": "video_path",
    }
    assert collator.video_processing.frame_extraction.num_frames == 16


def test_notices_are_no_part_of_the_configuration(project: Project) -> None:
    assert "notices" not in project.load().dump()
