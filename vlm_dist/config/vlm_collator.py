"""`vlm_collator_config.yaml`: from the columns of the data to the tokens and labels of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vlm_dist.config.message_variables import variables_in
from vlm_dist.config.section import AS_TUPLE, Count, Name, PositiveNumber, Section

#: Keys of dataset_columns that hold media, and the placeholder that shows them.
MEDIA_COLUMNS = {"image_column": "image", "video_column": "video"}


class DatasetColumns(Section, extra="allow"):
    """Variable -> column of the data; null is absent. Further keys of the user's are further variables.

    `messages_column` is no variable: it names a column of whole conversations, which take the place of message_format.
    """

    __pydantic_extra__: dict[str, Name | None] = Field(init=False)

    image_column: Name | None = "image"
    question_column: Name | None = "question"
    answer_column: Name | None = "answer"
    video_column: Name | None = "video"
    context_column: Name | None = None
    messages_column: Name | None = None

    @property
    def mapping(self) -> dict[str, str]:
        """All variables that have a column."""
        return {key: column for key, column in self.model_dump().items() if column is not None}


class DataProcessing(Section):
    """Which media are read."""

    image_data: bool = True
    video_data: bool = False


class ContentPart(Section):
    """A piece of a message: text with variables, or the place of an image or a video."""

    type: Literal["text", "image", "video"]
    text: str | None = None


class Message(Section):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[tuple[ContentPart, ...], AS_TUPLE, Field(min_length=1)]

    foreign_keys: ClassVar[dict[str, str]] = {"text": "text belongs in content: [{type: text, text: …}]"}


def _default_messages() -> tuple[Message, ...]:
    """Prompt, picture and question; then the answer."""
    question = (
        ContentPart(type="text", text="{system_prompt}"),
        ContentPart(type="image"),
        ContentPart(type="text", text="{question_column}"),
    )
    answer = (ContentPart(type="text", text="{answer_column}"),)
    return (Message(role="user", content=question), Message(role="assistant", content=answer))


class MessageFormat(Section):
    """The conversation that a sample becomes."""

    system_prompt: str | None = "Answer briefly."
    training_messages: Annotated[tuple[Message, ...], AS_TUPLE, Field(min_length=1)] = Field(
        default_factory=_default_messages
    )

    def variables(self) -> Iterator[tuple[int, int, str]]:
        """(message, part, variable) for each variable of each text."""
        for m, message in enumerate(self.training_messages):
            for p, part in enumerate(message.content):
                for name in variables_in(part.text or ""):
                    yield m, p, name

    def has_placeholder(self, kind: Literal["image", "video"]) -> bool:
        """Whether any message shows this kind of media."""
        return any(part.type == kind for message in self.training_messages for part in message.content)


class ImageProcessing(Section):
    """What happens to an image before the model's own processor."""

    convert_to_rgb: bool = True
    resize_mode: Literal["keep_aspect", "crop", "stretch"] = "keep_aspect"
    max_size: Count | None = None  # pixels; null: no limit


class FrameExtraction(Section):
    """Which frames of a video are looked at."""

    library: Literal["decord", "cv2", "pyav", "torchcodec", "auto"] = "decord"
    sampling_strategy: Literal["uniform"] = "uniform"
    num_frames: Count = 8


class FileProcessing(Section):
    """How a video file is read."""

    convert_to_rgb: bool = True  # false: the colours in the library's own order; cv2: blue, green, red
    max_duration: PositiveNumber | None = None  # seconds; null: no limit


class VideoProcessing(Section):
    """Only read while data_processing.video_data is on."""

    enabled: bool = True
    frame_extraction: FrameExtraction = Field(default_factory=FrameExtraction)
    file_processing: FileProcessing = Field(default_factory=FileProcessing)


class TextProcessing(Section):
    """From text to tokens."""

    padding: bool = True
    truncation: bool = True
    max_length: Count = 2048  # tokens, visual tokens included
    pad_to_multiple_of: Count | None = None  # lengths of micro-batches are rounded up to it; null: as they come
    add_generation_prompt: bool = False


class LabelMasking(Section):
    """Which tokens carry no loss."""

    mask_pad_token: bool = True
    mask_image_token: bool = True
    mask_input_tokens: bool = False
    ignore_index: Annotated[int, Field(lt=0)] = -100  # the label of masked tokens; ids of tokens begin at 0


class VlmCollatorConfig(Section):
    """The eight parts, in the order in which a sample meets them."""

    dataset_columns: DatasetColumns = Field(default_factory=DatasetColumns)
    data_processing: DataProcessing = Field(default_factory=DataProcessing)
    message_format: MessageFormat = Field(default_factory=MessageFormat)
    image_processing: ImageProcessing = Field(default_factory=ImageProcessing)
    video_processing: VideoProcessing = Field(default_factory=VideoProcessing)
    text_processing: TextProcessing = Field(default_factory=TextProcessing)
    label_masking: LabelMasking = Field(default_factory=LabelMasking)

    @property
    def required_columns(self) -> dict[str, str]:
        """Variable -> column for what a sample must have: the variables of the texts, and the media that are on."""
        used = {name for _, _, name in self.message_format.variables()}
        if self.dataset_columns.messages_column is not None:
            used = {"messages_column"}
        used |= {"image_column"} if self.data_processing.image_data else set()
        used |= {"video_column"} if self.data_processing.video_data else set()
        return {key: column for key, column in self.dataset_columns.mapping.items() if key in used}
