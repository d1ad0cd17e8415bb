"""What must hold between collator config, data and family, and what is worth a line; checked once, before training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.encoding.labels import Renderer
from vlm_dist.data.encoding.template import MESSAGES_COLUMN, MessageBuilder
from vlm_dist.data.media.video_readers import describe, libraries_for
from vlm_dist.data.types import Source
from vlm_dist.errors import ConfigError, ModelError, SkipSample
from vlm_dist.families import Family

#: What data sets call their columns of conversations.
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")

log = logging.getLogger(__name__)


def check_family(family: Family) -> None:
    """Refuse a family that cannot be trained.

    Raises:
        ConfigError: with the reason.
    """
    if family.refusal is not None:
        raise ConfigError(f"models of the family {family.name} cannot be trained: {family.refusal}")


def choose_kinds(config: VlmCollatorConfig, family: Family) -> frozenset[str]:
    """Choose what is read: "image", "video", both, or nothing.

    Raises:
        ConfigError: videos are on, but the family takes none.
    """
    switches = config.data_processing
    images, videos = switches.image_data, switches.video_data
    if videos and not family.takes_video:
        raise ConfigError(
            f"data_processing.video_data is on, but models of the family {family.name} take no videos; set it to false"
        )
    if images and videos and not family.takes_image_and_video:
        log.warning(
            "image_data and video_data are both on, but models of the family %s are given one kind: "
            "videos have priority, images are left out",
            family.name,
        )
        images = False
    return frozenset(kind for kind, is_on in (("image", images), ("video", videos)) if is_on)


def check_columns(builder: MessageBuilder, sources: Sequence[Source]) -> None:
    """Check that the data has the columns that the messages need.

    A text column has to be in every source; a column of images or videos in one at least.

    Raises:
        ConfigError: listing all that are missing, and what there is.
    """
    problems = []
    for source in sources:
        for variable, column in builder.text_columns.items():
            if column not in source.columns:
                there = ", ".join(source.columns)
                problems.append(f"dataset_columns.{variable}: {source.name} has no column {column!r}; it has: {there}")
    media = builder.media_columns
    for kind, column in media.items():
        if sources and not any(column in source.columns for source in sources):
            there = "; ".join(f"{source.name} has: {', '.join(source.columns)}" for source in sources)
            problems.append(
                f"dataset_columns.{kind}_column: no source has a column {column!r}; {there}. "
                f"Without {kind}s, set data_processing.{kind}_data: false"
            )
    if problems:
        raise ConfigError("\n".join([*problems, *_conversations_hint(builder, sources)]))
    for source in sources:
        if media and not any(column in source.columns for column in media.values()):
            log.warning("%s has no column %s: its samples are text only", source.name, " or ".join(media.values()))


def _conversations_hint(builder: MessageBuilder, sources: Sequence[Source]) -> list[str]:
    """Where the data has conversations, and the configuration asks for questions and answers."""
    if MESSAGES_COLUMN in builder.text_columns:
        return []
    for source in sources:
        for column in CONVERSATION_COLUMNS:
            if column in source.columns:
                return [
                    f"{source.name} has a column {column!r}: if it holds conversations, set "
                    f"dataset_columns.messages_column: {column!r} in the place of the text columns"
                ]
    return []


def check_labels(config: VlmCollatorConfig, family: Family) -> None:
    """Check that the labels can be made as configured, and say what has no effect.

    Raises:
        ConfigError: visual tokens are to be learned, but have no ids that could be.
    """
    if family.negative_image_ids and not config.label_masking.mask_image_token:
        raise ConfigError(
            f"label_masking.mask_image_token is false, but models of the family {family.name} have negative ids in the "
            "place of images, which cannot be learned; set it to true"
        )


def check_messages(renderer: Renderer, builder: MessageBuilder, kinds: Collection[str]) -> None:
    """Check that the chat template takes the messages as they are configured, and shows what media there are.

    Args:
        renderer: of the model's template.
        builder: of the messages.
        kinds: of media that the data has, "image" and "video".

    Raises:
        ConfigError: it refuses them, so it would refuse every sample.
        ModelError: its text is the same with and without an image, which no processor takes.
    """
    if renderer.substitute_of is not None:
        _tell_once(
            f"the model has no chat template: messages are written in the form of the family {renderer.substitute_of} "
            "(docs/models.md); if it was trained with another one, put a chat_template.jinja beside its tokenizer"
        )
    fields = builder.empty_fields()
    messages = builder.build(fields).messages
    try:
        plain = renderer.render(messages).text
        shown = {
            kind: renderer.render(builder.build(fields | {column: b""}).messages).text
            for kind, column in builder.media_columns.items()
            if kind in kinds
        }
    except SkipSample as skip:
        raise ConfigError(f"message_format.training_messages: {skip.message}") from skip
    for kind, text in shown.items():
        if text == plain:
            raise ModelError(
                f"the model's chat template writes nothing in the place of an {kind}".replace("an video", "a video")
                + f' (a part {{"type": "{kind}"}} of a message), so that no sample with one can be made: take the '
                "chat_template.jinja of a model whose template does, as published by its makers, or switch "
                f"data_processing.{kind}_data off"
            )


def choose_video_libraries(config: VlmCollatorConfig) -> tuple[str, ...]:
    """Choose what reads the videos, in the order in which libraries are tried; none where there are no videos.

    Raises:
        ConfigError: the library is not installed.
    """
    if not config.data_processing.video_data:
        return ()
    chosen = config.video_processing.frame_extraction.library
    libraries = libraries_for(chosen)
    if chosen == "auto":
        _tell_once(f"videos are read by the first of these that can open them: {describe(libraries)}")
    if not config.video_processing.file_processing.convert_to_rgb:
        if "cv2" in libraries:
            log.warning(
                "video_processing.file_processing.convert_to_rgb is false: frames read by cv2 reach the model with "
                "blue and red exchanged"
            )
        else:
            log.warning(
                "video_processing.file_processing.convert_to_rgb: false has no effect: %s gives RGB frames", chosen
            )
    return libraries


@cache
def _tell_once(line: str) -> None:
    """Log a line: training and each evaluation make their own materialiser, of the same configuration."""
    log.info("%s", line)


def choose_pad_token(tokenizer: Any) -> int:
    """Choose the id that fills rows up: the tokenizer's pad token, else its end-of-sequence token.

    Raises:
        ModelError: it has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ModelError(f"{type(tokenizer).__name__} has no pad token and no end-of-sequence token to fill rows with")


def find_markers(kinds: frozenset[str], processor: Any, family: Family) -> Mapping[str, str]:
    """Find what the model's text has in the place of one image or video.

    Raises:
        ModelError: neither the family nor the processor tells.
    """
    own = {"image": family.image_marker, "video": family.video_marker}
    markers = {}
    for kind in sorted(kinds):
        names = ["boi_token", "image_token"] if kind == "image" else ["video_token"]
        found = own[kind] or next((token for name in names if (token := getattr(processor, name, None))), None)
        if found is None:
            raise ModelError(
                f"{type(processor).__name__} does not say which token stands for one {kind}; "
                f"switch data_processing.{kind}_data off, or use a model whose processor has {kind}_token"
            )
        markers[kind] = str(found)
    return markers
