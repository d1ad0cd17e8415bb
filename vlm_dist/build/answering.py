"""A trained model to talk to: one process, no DeepSpeed, and the prompt exactly as it was in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from vlm_dist.build.data import make_processor
from vlm_dist.checkpoint import StartingPoint
from vlm_dist.checkpoint.earlier_tokens import check_new_tokens
from vlm_dist.checkpoint.layout import RESOLVED_CONFIG
from vlm_dist.config import RunConfig, load_run
from vlm_dist.data.encoding.preconditions import choose_kinds
from vlm_dist.data.encoding.template import MESSAGES_COLUMN, MessageBuilder
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.media.named import NamedBytes
from vlm_dist.data.types import MicroBatch, MicroBatchJob, RawSample, SampleOrigin, SampleRef
from vlm_dist.errors import ConfigError, DataError
from vlm_dist.evaluate.generation import also_end_with, greedy_config, learned_ends, special_ids
from vlm_dist.families import Family
from vlm_dist.model import (
    attach_adapter,
    load_model,
    make_room_for_tokens,
    parse_dtype,
    prepare_checkpoint,
    quantization_arguments,
)
from vlm_dist.model.checkpointing import base_model as without_adapter

#: Of the prompt's variables, beside the question.
Values = Mapping[str, str]
NO_VALUES: Values = {}

#: Of `dataset_columns`: what the user asks, where the prompt has several variables.
QUESTION = "question_column"


@dataclass
class _Asked:
    """The one sample of a data set that is asked."""

    columns: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    name: str = "question"
    manifest_hash: str = ""
    shard_sizes: Sequence[int] = (1,)

    def __len__(self) -> int:
        return 1

    def origin(self, index: int) -> SampleOrigin:
        return SampleOrigin(self.name, "", str(index))

    def read(self, index: int) -> RawSample:
        return RawSample(self.fields, self.origin(index))


class Prompts:
    """Makes prompts as the run's own materialiser does.

    Args:
        config: of the run.
        processor: of its model.
        family: its row.

    Raises:
        ConfigError: the configuration does not fit the family.
    """

    def __init__(self, config: RunConfig, processor: Any, family: Family) -> None:
        self._collator = config.collator
        columns = config.collator.dataset_columns.mapping
        kinds = choose_kinds(config.collator, family)
        self._builder = MessageBuilder(columns, config.collator.message_format, kinds)
        self._source = _Asked(tuple(columns.values()))
        sources: list[Any] = [self._source]  # of a data source the materialiser needs no more
        self._prompts, self._answered = (
            Materialiser(sources, processor, family, config.collator, frozenset(), 0, for_generation=generates)
            for generates in (True, False)
        )

    def prompt(
        self, question: str, images: Sequence[bytes] = (), videos: Sequence[bytes] = (), values: Values = NO_VALUES
    ) -> MicroBatch:
        """The prompt of one question: `inputs` of one row.

        Args:
            question: what the user asks.
            images: encoded, in order.
            videos: encoded, in order.
            values: of other variables of the prompt.

        Raises:
            ConfigError: the run knows no such media, or a variable has no value.
            DataError: the prompt cannot be made of them.
        """
        return self._make(self._prompts, question, images, videos, "", values)

    def ends(self, special: frozenset[int], question: str, values: Values = NO_VALUES) -> set[int]:
        """The tokens that the model was taught to end an answer with; none where that cannot be seen."""
        try:
            batch = self._make(self._answered, question, (), (), "yes", values)
        except DataError:  # too long, maybe: the model's own end will have to do
            return set()
        return learned_ends(batch.labels, special, self._collator.label_masking.ignore_index)

    def _make(
        self,
        materialise: Materialiser,
        question: str,
        images: Sequence[bytes],
        videos: Sequence[bytes],
        answer: str,
        values: Values,
    ) -> MicroBatch:
        self._source.fields = self._fields(question, images, videos, answer, values)
        batch = materialise(MicroBatchJob(0, 0, (SampleRef(0, 0),)))
        if batch.null_slots:
            raise DataError(batch.null_slots[0].message)
        return batch

    def _fields(
        self,
        question: str,
        images: Sequence[bytes],
        videos: Sequence[bytes],
        answer: str,
        values: Values,
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for kind, items in (("image", images), ("video", videos)):
            if not items:
                continue
            if kind not in self._builder.media_columns:
                switch = f"data_processing.{kind}_data"
                if getattr(self._collator.data_processing, f"{kind}_data"):
                    raise ConfigError(
                        f"the run was trained without {kind}s: the model takes one kind, and got the other"
                    )
                raise ConfigError(
                    f"the run was trained without {kind}s ({switch} is false); to try all the same: --set "
                    f"collator.{switch}=true"
                )
            fields[self._builder.media_columns[kind]] = list(items)
        texts = self._builder.text_columns
        if MESSAGES_COLUMN in texts:
            turns = (("user", question), ("assistant", answer))
            return {**fields, texts[MESSAGES_COLUMN]: [{"role": role, "content": text} for role, text in turns]}
        asked = {name: column for name, column in texts.items() if column not in self._builder.answer_columns}
        unknown = sorted(set(values) - set(asked))
        if unknown:
            there = ", ".join(asked)
            raise ConfigError(f"--field: the prompt has no variable {', '.join(unknown)}, only {there}")
        open_ones = [name for name in asked if name not in values]
        if QUESTION in open_ones or len(open_ones) == 1:
            values = {**values, QUESTION if QUESTION in open_ones else open_ones[0]: question}
        missing = [name for name in asked if name not in values]
        if missing:
            raise ConfigError(f"the prompt has other variables, too: give them with --field {missing[0]}=TEXT")
        fields |= {column: values[name] for name, column in asked.items()}
        return fields | {column: answer for column in texts.values() if column in self._builder.answer_columns}


class Answering:
    """A model that answers questions; made by `open_answering`.

    Args:
        model: with its adapter, on its device.
        tokenizer: of the model.
        prompts: as in training.
        dtype: that it computes in.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Prompts, dtype: torch.dtype) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._dtype = dtype

    def answer(
        self,
        question: str,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        streams: bool = False,
        values: Values = NO_VALUES,
    ) -> str:
        """Answer one question.

        Args:
            question: what the user asks; no question before it is remembered.
            images: encoded.
            videos: encoded.
            max_new_tokens: limit of the answer.
            temperature: of what is drawn; 0 is greedy, as in evaluation.
            streams: print tokens as they come.
            values: of other variables of the prompt.

        Raises:
            ConfigError: the run knows no such media, or a variable has no value.
            DataError: a file cannot be decoded, or the prompt is too long.
        """
        batch = self._prompts.prompt(question, images, videos, values)
        device = next(self._model.parameters()).device
        inputs = {
            name: value.to(device=device, dtype=self._dtype if value.is_floating_point() else value.dtype)
            for name, value in batch.inputs.items()
        }
        config = greedy_config(without_adapter(self._model), self._tokenizer, max_new_tokens)
        also_end_with(config, self._prompts.ends(special_ids(self._tokenizer), question, values))
        if temperature > 0:
            config.do_sample, config.temperature = True, temperature
        more: dict[str, Any] = {}
        if streams:
            from transformers import TextStreamer

            more["streamer"] = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            ids = without_adapter(self._model).generate(**inputs, generation_config=config, **more)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(self._tokenizer.decode(new, skip_special_tokens=True)).strip()


def find_run_file(adapter: Path) -> Path:
    """The configuration of the run that made an adapter: in its directory, or beside it.

    Raises:
        ConfigError: there is none.
    """
    if not adapter.is_dir():
        raise ConfigError(f"--adapter: no such directory: {adapter}")
    for directory in (adapter, adapter.resolve().parent):
        if (directory / RESOLVED_CONFIG).is_file():
            return directory / RESOLVED_CONFIG
    raise ConfigError(
        f"{adapter} has no {RESOLVED_CONFIG}, nor has the folder that it lies in, so that nobody knows the prompt that "
        "it was trained with; name the run file: vlm-dist generate RUN.yaml --adapter DIR"
    )


def load_answering_config(run_file: Path, overrides: Sequence[str], base_model: str | None) -> RunConfig:
    """The run's configuration, as far as an answer depends on it.

    Args:
        run_file: of the run, or its resolved_config.yaml.
        overrides: as `--set` takes them.
        base_model: where the base model is now; None: where the run says.

    Raises:
        ConfigError: with every problem.
    """
    # DeepSpeed's JSON is not needed, and may not be there any more: any file stands for it
    more = [*overrides, f"deepspeed={json.dumps(str(run_file))}"]
    if base_model is None:
        return load_run(run_file, more)
    config = load_run(run_file, [*more, f"model_id={json.dumps(base_model)}"])
    written = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    earlier = written.get("model_id", written.get("model"))
    own = config.model.model_classes.get(earlier) if isinstance(earlier, str) else None
    if own is None or base_model in config.model.model_classes:
        return config
    classes = {**config.model.model_classes, base_model: own}  # what was set for the model by its name
    return config.model_copy(update={"model": config.model.model_copy(update={"model_classes": classes})})


def open_answering(config: RunConfig, adapter: Path | None) -> Answering:
    """Load a model and its adapter, on the GPU where there is one.

    Args:
        config: of the run.
        adapter: its directory; None: the base alone.

    Raises:
        CheckpointError: the adapter cannot be read.
        ConfigError: it is of another form than the configuration says.
        ModelError: the model cannot be loaded.
    """
    loading = config.model.loading_for(config.model_id)
    dtype = parse_dtype(config.train.precision)
    point = None
    if adapter is not None:
        point = StartingPoint.open(adapter)
        point.check_settings(config.peft)
    processor, family = make_processor(config)
    if point is not None:
        check_new_tokens(point, processor)
    prompts = Prompts(config, processor, family)
    prepare_checkpoint(config.model_id, config.model_entry, loading)
    arguments = loading.model_dump() | quantization_arguments(config.peft.quantization, dtype)
    model: Any = load_model(config.model_id, config.model_entry, arguments, dtype=dtype)
    make_room_for_tokens(model, processor.new_token_ids, config.train.seed)
    if point is not None:
        model = attach_adapter(model, config.peft, config.peft.towers.model_dump(), seed=config.train.seed)
        names = point.parameter_names(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for key, tensor in point.read().items():
                parameters[names[key]].copy_(tensor)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Answering(model, getattr(processor, "tokenizer", processor), prompts, dtype)


def read_media(paths: Sequence[Path]) -> list[bytes]:
    """Read images or videos.

    Raises:
        DataError: there is no such file.
    """
    media: list[bytes] = []
    for path in paths:
        try:
            media.append(NamedBytes.of(path.read_bytes(), str(path)))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return media
