"""Laws of what becomes of a sample: variables, messages, pictures and clips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from vlm_dist.config.explain import nearest
from vlm_dist.config.laws.finding import Finding
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.vlm_collator import MEDIA_COLUMNS, DatasetColumns, VlmCollatorConfig
from vlm_dist.config.yaml_document import KeyPath


def check_variables(collator: VlmCollatorConfig) -> Iterator[Finding]:
    """Variables of the message format have a column, and columns of one's own are used."""
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


def check_messages(collator: VlmCollatorConfig) -> Iterator[Finding]:
    """The messages are a conversation that can be trained on."""
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


def check_media(collator: VlmCollatorConfig) -> Iterator[Finding]:
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


def check_processing(collator: VlmCollatorConfig, train: TrainConfig) -> Iterator[Finding]:
    """Settings of pictures and text that do nothing beside others."""
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
    if text.pad_to_multiple_of is not None and not text.padding:
        message = "got a number, expected null: padding is false; set that to true, or this to null"
        path: KeyPath = ("collator", "text_processing", "pad_to_multiple_of")
        yield Finding(path, message, also=(("collator", "text_processing", "padding"),))
    if text.add_generation_prompt:
        message = "true in training puts the start of one more answer behind each sample; usually false"
        yield Finding(("collator", "text_processing", "add_generation_prompt"), message, is_notice=True)
