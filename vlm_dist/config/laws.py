"""Laws between keys: each value is fine alone, but not beside another; and what is legal but worth a line.

A law reads a draft of the whole configuration and yields findings. A finding names every path that it depends on,
so that it is not reported where one of them is broken already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from vlm_dist.config.data import DataConfig, DataSource
from vlm_dist.config.explain import nearest
from vlm_dist.config.masking import MASK
from vlm_dist.config.peft import PeftConfig
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.vlm_collator import MEDIA_COLUMNS, DatasetColumns, VlmCollatorConfig
from vlm_dist.config.vlm_model import VlmModelConfig
from vlm_dist.config.yaml_document import KeyPath
from vlm_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Draft:
    """The five sections; a section with errors has defaults in the place of what is wrong."""

    model_id: str | None
    model: VlmModelConfig
    collator: VlmCollatorConfig
    train: TrainConfig
    peft: PeftConfig
    data: DataConfig


@dataclass(frozen=True, slots=True)
class Finding:
    """What a law found.

    Attributes:
        path: the value that is to be changed.
        message: what is wrong with it.
        also: other values that the law read.
        is_notice: legal, only worth a line.
    """

    path: KeyPath
    message: str
    also: tuple[KeyPath, ...] = field(default=())
    is_notice: bool = False


def findings(draft: Draft) -> Iterator[Finding]:
    """All findings of all laws."""
    yield from _known_model(draft)
    yield from _precision(draft)
    yield from _placement(draft)
    yield from _variables(draft.collator)
    yield from _messages(draft.collator)
    yield from _media(draft.collator)
    yield from _processing(draft.collator, draft.train)
    yield from _training(draft.train, draft.data)
    yield from _best(draft.train, draft.data)
    yield from _packing(draft.train, draft.collator)
    yield from _lengths(draft.train, draft.data)
    yield from _workers(draft.train, draft.data, draft.collator)
    yield from _compilation(draft)
    yield from _towers(draft.peft)
    yield from _sources(draft.data)


def _known_model(draft: Draft) -> Iterator[Finding]:
    if draft.model_id is None:
        return
    try:
        draft.model.entry(draft.model_id)
    except ConfigError as error:
        yield Finding(("model_id",), str(error), also=(("model", "model_classes"),))


def _precision(draft: Draft) -> Iterator[Finding]:
    bf16, fp16 = ("train", "bf16"), ("train", "fp16")
    dtype_path: KeyPath = ("model", "loading_params", "torch_dtype")
    if draft.train.bf16 and draft.train.fp16:
        yield Finding(fp16, "got true beside bf16: true, expected at most one of them", also=(bf16,))
        return
    dtype = draft.model.loading_params.dtype_name
    try:
        own = draft.model.loading_for(draft.model_id) if draft.model_id else None
    except ConfigError:  # the unknown model is a finding of its own
        own = None
    if own is not None and own.dtype_name != dtype:
        dtype, dtype_path = own.dtype_name, ("model", "model_classes", str(draft.model_id), *dtype_path[1:])
    precision = draft.train.precision
    if dtype == precision:
        return
    if dtype == "float32":
        message = f"float32 has no effect: the model is loaded in {precision}, in which training computes"
        yield Finding(dtype_path, message, also=(bf16, fp16), is_notice=True)
        return
    switches = f"train.bf16: {_yaml(draft.train.bf16)}, train.fp16: {_yaml(draft.train.fp16)}"
    fix = {"bfloat16": "train.bf16: true", "float16": "train.bf16: false and train.fp16: true"}[dtype]
    message = f"got {dtype}, expected torch.{precision} beside {switches}; or set {fix}"
    yield Finding(dtype_path, message, also=(bf16, fp16))


def _placement(draft: Draft) -> Iterator[Finding]:
    """Loading parameters without effect: the common ones, and those of this run's model."""
    common: KeyPath = ("model", "loading_params")
    model_id = draft.model_id
    places = [(common, draft.model.loading_params)]
    own = draft.model.model_classes.get(model_id) if model_id is not None else None
    if own is not None and own.loading_params is not None:
        places.append((("model", "model_classes", str(model_id), "loading_params"), own.loading_params))
    for path, loading in places:
        given = loading.model_fields_set
        if loading.device_map is not None and (path == common or "device_map" in given):
            message = (
                f"{loading.device_map} has no effect: under DeepSpeed the engine places the model, one rank per device"
            )
            yield Finding((*path, "device_map"), message, is_notice=True)
        if loading.revision is not None and model_id is not None and Path(model_id).expanduser().is_dir():
            message = f"has no effect: {model_id} is a local directory, which has no revisions"
            yield Finding((*path, "revision"), message, also=(("model_id",),), is_notice=True)


def _variables(collator: VlmCollatorConfig) -> Iterator[Finding]:
    columns = collator.dataset_columns
    columns_path: KeyPath = ("collator", "dataset_columns")
    if columns.messages_column is not None:
        text = f"message_format has no effect: column {columns.messages_column!r} holds whole conversations"
        yield Finding((*columns_path, "messages_column"), text, is_notice=True)
        return
    messages_path: KeyPath = ("collator", "message_format", "training_messages")
    prompt_path: KeyPath = ("collator", "message_format", "system_prompt")
    known = [*(name for name in columns.model_dump() if name != "messages_column"), "system_prompt"]
    used = set()
    for message, part, name in collator.message_format.variables():
        used.add(name)
        path = (*messages_path, message, "content", part, "text")
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {{{close}}}?" if close else ""
            text = f"got the unknown variable {{{name}}}, expected one of {', '.join(known)}{hint}"
            yield Finding(path, text, also=(columns_path,))
        elif name in MEDIA_COLUMNS:
            text = f"got {{{name}}}, which is no text; expected a part {{type: {MEDIA_COLUMNS[name]}}} in its place"
            yield Finding(path, text)
        elif name == "system_prompt" and collator.message_format.system_prompt is None:
            yield Finding(path, "uses {system_prompt}, but system_prompt is null", also=(prompt_path,))
        elif name != "system_prompt" and columns.mapping.get(name) is None:
            text = f"uses {{{name}}}, but dataset_columns.{name} is null; name its column, or remove the variable"
            yield Finding(path, text, also=((*columns_path, name),))
    for name in columns.__pydantic_extra__ or {}:
        if name in used:
            continue
        close = nearest(name, list(DatasetColumns.model_fields), cutoff=0.8)
        if close is not None:
            text = f"got an unknown key that message_format does not use; did you mean {close}?"
            yield Finding((*columns_path, name), text, also=(messages_path,))
        else:
            text = "a variable of your own that message_format does not use"
            yield Finding((*columns_path, name), text, also=(messages_path,), is_notice=True)


def _messages(collator: VlmCollatorConfig) -> Iterator[Finding]:
    if collator.dataset_columns.messages_column is not None:
        return
    messages = collator.message_format.training_messages
    base: KeyPath = ("collator", "message_format", "training_messages")
    for m, message in enumerate(messages):
        for p, part in enumerate(message.content):
            path = (*base, m, "content", p)
            if part.type == "text" and part.text is None:
                yield Finding(path, "a part of type text needs its text: {type: text, text: …}")
            elif part.type != "text" and part.text is not None:
                yield Finding((*path, "text"), f"got a text in a part of type {part.type}; expected a part of its own")
    if all(message.role != "assistant" for message in messages):
        yield Finding(base, "got no message of role assistant, expected at least one: it is what the model learns")


def _media(collator: VlmCollatorConfig) -> Iterator[Finding]:
    """What is switched on needs a column and a place in the messages.

    Where only one kind is on, it takes the placeholders of the other kind if it has none of its own and is the video:
    the default messages have an image placeholder, and switching to videos must not need more than the switch.
    """
    data, form = collator.data_processing, collator.message_format
    base: KeyPath = ("collator", "data_processing")
    messages: KeyPath = ("collator", "message_format", "training_messages")
    image, video = form.has_placeholder("image"), form.has_placeholder("video")
    for switch, column, is_on in (
        ("image_data", "image_column", data.image_data),
        ("video_data", "video_column", data.video_data),
    ):
        column_path: KeyPath = ("collator", "dataset_columns", column)
        if is_on and column not in collator.dataset_columns.mapping:
            text = f"got null beside data_processing.{switch}: true, expected the name of a column"
            yield Finding(column_path, text, also=((*base, switch),))
    enabled: KeyPath = ("collator", "video_processing", "enabled")
    if data.video_data and not collator.video_processing.enabled:
        text = "got false beside data_processing.video_data: true; set both to the same"
        yield Finding(enabled, text, also=((*base, "video_data"),))
    switches = ((*base, "image_data"), (*base, "video_data"))
    if collator.dataset_columns.messages_column is not None:
        return  # the conversations have their own <image> and <video>
    if data.image_data and data.video_data:
        # where the family takes one kind only, the data room warns that videos have priority
        if not (image or video):
            yield Finding(messages, "has no {type: image} and no {type: video}, but both are on", also=switches)
    elif data.video_data:
        if not (image or video):
            yield Finding(messages, "has no {type: video} (or image) part, but video_data is on", also=switches)
        elif image:
            text = "{type: image} is left out: image_data is off" if video else "{type: image} stands for the video"
            yield Finding(messages, text, also=switches, is_notice=True)
    elif data.image_data:
        if not image:
            hint = "; {type: video} is left out while video_data is off" if video else ""
            yield Finding(messages, f"has no {{type: image}} part, but image_data is on{hint}", also=switches)
        elif video:
            text = "{type: video} is left out: video_data is off"
            yield Finding(messages, text, also=switches, is_notice=True)
    elif image or video:
        kind: Literal["image", "video"] = "image" if image else "video"
        text = f"has a {{type: {kind}}} part, but image_data and video_data are off; remove it, or switch one on"
        yield Finding(messages, text, also=switches)


def _processing(collator: VlmCollatorConfig, train: TrainConfig) -> Iterator[Finding]:
    image, text = collator.image_processing, collator.text_processing
    resize_path: KeyPath = ("collator", "image_processing", "resize_mode")
    if image.max_size is None and image.resize_mode != "keep_aspect":
        message = f"{image.resize_mode} has nothing to do: max_size is null, so images are not resized"
        yield Finding(resize_path, message, also=((*resize_path[:-1], "max_size"),), is_notice=True)
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if train.packing and key == "per_device_train_batch_size":
            continue  # packs have no padding
        size = getattr(train, key)
        if not text.padding and size > 1:
            message = f"got false, expected true: samples of different lengths need it; or set train.{key} {size} to 1"
            yield Finding(("collator", "text_processing", "padding"), message, also=(("train", key),))
            break
    if text.add_generation_prompt:
        message = "true in training puts the start of one more answer behind each sample; usually false"
        yield Finding(("collator", "text_processing", "add_generation_prompt"), message, is_notice=True)


def _training(train: TrainConfig, data: DataConfig) -> Iterator[Finding]:
    if not train.gradient_checkpointing and "gradient_checkpointing_policy" in train.model_fields_set:
        policy = train.gradient_checkpointing_policy
        if (policy.language, policy.vision) != ("all", "all"):
            yield Finding(
                ("train", "gradient_checkpointing_policy"),
                "has no effect: gradient_checkpointing is false",
                also=(("train", "gradient_checkpointing"),),
                is_notice=True,
            )
    if train.warmup_steps and "warmup_ratio" in train.model_fields_set and train.warmup_ratio:
        message = f"has no effect: warmup_steps {train.warmup_steps} wins"
        yield Finding(("train", "warmup_ratio"), message, also=(("train", "warmup_steps"),), is_notice=True)
    if train.warmup_steps and train.lr_scheduler_type == "constant":
        message = "has no effect: lr_scheduler_type constant has no warm-up; constant_with_warmup has"
        yield Finding(("train", "warmup_steps"), message, also=(("train", "lr_scheduler_type"),), is_notice=True)
    if data.eval:
        if train.predict_with_generate and not (train.eval_steps or train.eval_on_start):
            message = "has no effect: eval_steps is 0 and eval_on_start is false, so no evaluation is ever due"
            also: tuple[KeyPath, ...] = (("train", "eval_steps"), ("train", "eval_on_start"))
            yield Finding(("train", "predict_with_generate"), message, also=also, is_notice=True)
        return
    if train.predict_with_generate:
        message = "got true, but data.eval is empty: name held-out samples"
        yield Finding(("train", "predict_with_generate"), message, also=(("data", "eval"),))
    elif train.eval_steps or train.eval_on_start:
        message = "no held-out samples: no evaluation"
        yield Finding(("data", "eval"), message, also=(("train", "eval_steps"),), is_notice=True)


def _best(train: TrainConfig, data: DataConfig) -> Iterator[Finding]:
    """What it takes to know the best checkpoint."""
    metric: KeyPath = ("train", "metric_for_best_model")
    better: KeyPath = ("train", "greater_is_better")
    if train.metric_for_best_model is None:
        if train.greater_is_better is not None:
            yield Finding(better, "has no effect: metric_for_best_model is null", also=(metric,), is_notice=True)
        return
    name = train.metric_for_best_model
    if not data.eval or not train.eval_steps:
        reason = "data.eval is empty: name held-out samples" if not data.eval else "eval_steps is 0"
        yield Finding(metric, f"got {name}, but {reason}", also=(("data", "eval"), ("train", "eval_steps")))
    elif name.endswith("exact_match") and not train.predict_with_generate:
        message = f"got {name}, which needs predict_with_generate: true"
        yield Finding(metric, message, also=(("train", "predict_with_generate"),))
    save, evaluate = train.save_steps, train.eval_steps
    if save and evaluate and (save < 1) == (evaluate < 1) and (Fraction(str(save)) % Fraction(str(evaluate))):
        message = (
            f"only checkpoints of steps that are evaluated can be the best, and save_steps {save:g} is no multiple of "
            f"eval_steps {evaluate:g}"
        )
        yield Finding(metric, message, also=(("train", "save_steps"), ("train", "eval_steps")), is_notice=True)


def _packing(train: TrainConfig, collator: VlmCollatorConfig) -> Iterator[Finding]:
    packing: KeyPath = ("train", "packing")
    tokens_path: KeyPath = ("train", "pack_max_tokens")
    if not train.packing:
        for key in ("pack_max_tokens", "pack_max_patches"):
            if getattr(train, key) is not None:
                yield Finding(("train", key), "has no effect: packing is false", also=(packing,), is_notice=True)
        return
    if train.group_by_length:
        message = "has no effect: packing wins, as it pads nothing"
        yield Finding(("train", "group_by_length"), message, also=(packing,), is_notice=True)
    longest = collator.text_processing.max_length
    if train.pack_max_tokens is not None and train.pack_max_tokens < longest:
        message = (
            f"{train.pack_max_tokens} is less than text_processing.max_length {longest}: a sample that is longer has a "
            "pack of its own, as long as it is"
        )
        also: tuple[KeyPath, ...] = (packing, ("collator", "text_processing", "max_length"))
        yield Finding(tokens_path, message, also=also, is_notice=True)


def _lengths(train: TrainConfig, data: DataConfig) -> Iterator[Finding]:
    if data.lengths != "auto" and not (train.group_by_length or train.packing):
        message = f"{data.lengths} has no effect: neither group_by_length nor packing asks for lengths"
        also: tuple[KeyPath, ...] = (("train", "group_by_length"), ("train", "packing"))
        yield Finding(("data", "lengths"), message, also=also, is_notice=True)


def _workers(train: TrainConfig, data: DataConfig, collator: VlmCollatorConfig) -> Iterator[Finding]:
    """What worker processes are for, where there are none."""
    if train.dataloader_num_workers:
        return
    workers: KeyPath = ("train", "dataloader_num_workers")
    if train.dataloader_prefetch_factor != TrainConfig.model_fields["dataloader_prefetch_factor"].default:
        message = "has no effect: with dataloader_num_workers 0 every step is prepared when it is needed"
        yield Finding(("train", "dataloader_prefetch_factor"), message, also=(workers,), is_notice=True)
    for key in ("sample_timeout_seconds", "worker_memory_gib"):
        if getattr(data, key) != DataConfig.model_fields[key].default:
            message = "has no effect: train.dataloader_num_workers is 0, so that samples are decoded in this process"
            yield Finding(("data", key), message, also=(workers,), is_notice=True)
    if collator.data_processing.video_data:
        message = "0 decodes videos in the training process, which a damaged one can end or hang; 1 outlives that"
        also = (("collator", "data_processing", "video_data"),)
        yield Finding(workers, message, also=also, is_notice=True)


def _compilation(draft: Draft) -> Iterator[Finding]:
    """What a block that is to be one graph cannot have in it. ZeRO's stage is in another file."""
    compiled: KeyPath = ("train", "torch_compile")
    if not draft.train.torch_compile:
        if draft.train.torch_compile_backend != TrainConfig.model_fields["torch_compile_backend"].default:
            message = "has no effect: torch_compile is false"
            yield Finding(("train", "torch_compile_backend"), message, also=(compiled,), is_notice=True)
        return
    try:
        loading = draft.model.loading_for(draft.model_id) if draft.model_id else draft.model.loading_params
    except ConfigError:  # the unknown model is a finding of its own
        return
    attention = loading.attn_implementation
    if attention not in (None, "sdpa", "eager"):
        message = (
            f"got true beside attn_implementation: {attention}, with which no block has been shown to be one graph "
            "(flash attention looks at the mask to find the padding); set attn_implementation to sdpa, or this to false"
        )
        yield Finding(compiled, message, also=(("model", "loading_params", "attn_implementation"),))


def _towers(peft: PeftConfig) -> Iterator[Finding]:
    policies = peft.towers.model_dump()
    whole: KeyPath = ("peft", "modules_to_save")
    if set(policies.values()) == {"freeze"} and not peft.modules_to_save:
        message = "every tower is frozen: nothing to train; set one of them to lora or full"
        yield Finding(("peft", "towers"), message, also=(whole,))
    elif "lora" not in policies.values():
        message = (
            "no tower is lora, so there is no adapter: r, target_modules, lora_alpha, lora_dropout, bias, use_rslora "
            "and use_dora have no effect"
        )
        yield Finding(("peft", "towers"), message, also=(whole,), is_notice=True)
    full = [tower for tower, policy in policies.items() if policy == "full"]
    if peft.quantization != "none" and full:
        message = f"got {peft.quantization}, expected none: a tower that is packed in 4 bits cannot be trained in full"
        yield Finding(("peft", "quantization"), message, also=tuple(("peft", "towers", tower) for tower in full))
    for tower, rate in peft.towers_learning_rate.model_dump().items():
        if rate is not None and policies[tower] == "freeze" and not peft.modules_to_save:
            message = f"{rate:g} has no effect: peft.towers.{tower} is freeze"
            also: tuple[KeyPath, ...] = (("peft", "towers", tower), whole)
            yield Finding(("peft", "towers_learning_rate", tower), message, also=also, is_notice=True)


def _sources(data: DataConfig) -> Iterator[Finding]:
    if not data.train:
        yield Finding(("data", "train"), "got no source, expected at least one: - {type: tar, path: …}")
    for name, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _source(source, ("data", name, index))
    for index, source in enumerate(data.eval):
        if source.repeat != 1:
            message = f"got {source.repeat:g}, expected 1: each held-out sample is evaluated once; remove it"
            yield Finding(("data", "eval", index, "repeat"), message)
        if source.weight is not None:
            message = f"got {source.weight:g}, expected none: each held-out sample is evaluated once; remove it"
            yield Finding(("data", "eval", index, "weight"), message)
    if data.cache.stage_files and data.cache.mode == "range":
        message = "got true beside mode: range, which copies nothing; expected mode: auto or whole"
        yield Finding(("data", "cache", "stage_files"), message, also=(("data", "cache", "mode"),))
    yield from _weights(data)


def _weights(data: DataConfig) -> Iterator[Finding]:
    weighted = [index for index, source in enumerate(data.train) if source.weight is not None]
    for index, source in enumerate(data.train if weighted else ()):
        path: KeyPath = ("data", "train", index)
        if source.weight is None:
            others = ", ".join(f"data.train[{number}]" for number in weighted)
            yield Finding((*path, "weight"), f"is missing: {others} has one; give all sources a weight, or none")
        elif "repeat" in source.model_fields_set:
            message = f"does not apply beside weight {source.weight:g}; remove one of them"
            yield Finding((*path, "repeat"), message, also=((*path, "weight"),))


def _source(source: DataSource, path: KeyPath) -> Iterator[Finding]:
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    if any(MASK in one and ("://" in one or one.startswith("pipe:")) for one in paths):
        message = f"has {MASK} in the place of a secret, which no run writes down; give the whole path again"
        yield Finding((*path, "path"), message)
    kinds = {"a URL" if "://" in one and not one.startswith("pipe:") else "a local path or pipe" for one in paths}
    if len(kinds) > 1:
        yield Finding((*path, "path"), "got URLs and local paths in one list; make them two sources")
    elif kinds == {"a URL"} and source.type != "tar":
        message = f"got a URL, expected a local path: over the network only tar shards are read, not {source.type}"
        yield Finding((*path, "path"), message, also=((*path, "type"),))
    if not isinstance(source.path, str | None) and source.type == "hf":
        yield Finding((*path, "path"), "got a list, expected one directory; data_files may be a list")
    if source.type == "hf":
        if source.path is None and source.name is None:
            yield Finding(path, "a source of type hf needs a name (of a dataset) or a path (written by save_to_disk)")
        if source.path is not None and source.data_files is not None:
            message = "does not apply beside path; it selects files of the dataset that name names"
            yield Finding((*path, "data_files"), message, also=((*path, "path"),))
        return
    if source.path is None:
        yield Finding(path, f"a source of type {source.type} needs a path")
    for key in ("split", "data_files", "media_root"):
        if getattr(source, key) is not None and not (key == "media_root" and source.type == "jsonl"):
            message = f"does not apply to a source of type {source.type}; remove it"
            yield Finding((*path, key), message, also=((*path, "type"),))


def _yaml(value: bool) -> str:
    return "true" if value else "false"
