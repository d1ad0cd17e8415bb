"""The nouns of the data room: what travels from the plan to the loss.

plan -> SampleRef (or None: null slot) -> | worker | RawSample -> Example -> MicroBatch -> trainer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

IGNORE_INDEX = -100  # inside this room; the materialiser's last act is to write what the config says

#: Why a slot of the plan carries no loss. Counted per step in the agreement of all ranks.
NULL_CLASSES = (
    "tail",  # the last step of an epoch has fewer samples than slots
    "decode",  # an image or a video cannot be decoded
    "bad_sample",  # a member or column is missing, not UTF-8, not JSON, or otherwise not what it should be
    "too_long",  # does not fit max_length even in its smallest form
    "over_budget",  # its pack is longer than predicted, and beyond the headroom
    "timeout",  # took longer than a sample may, on two workers
    "crash",  # its decoder ended the process, on two workers
)


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Names one slot's sample; a few integers, so that plans are cheap to send to workers."""

    source: int  # position in data.train (or data.eval)
    index: int  # row in the source's index
    repeat: int = 0  # which pass over the source within the epoch (sources with repeat > 1)


@dataclass(frozen=True, slots=True)
class SampleOrigin:
    """Where a sample came from, in words; named by every error and by the quarantine file."""

    source: str
    shard: str
    key: str
    offset: int | None = field(default=None, compare=False)  # of its first member in the shard, in bytes, where known

    def __str__(self) -> str:
        return f"{self.source}/{self.shard}:{self.key}"


@dataclass(frozen=True, slots=True)
class RawSample:
    """Undecoded columns of one sample."""

    fields: Mapping[str, Any]  # column -> bytes (media), str, number, or a list of them
    origin: SampleOrigin


class Source(Protocol):
    """A data set with random access by row; picklable, opens its files lazily (also after a fork or spawn)."""

    name: str

    def __len__(self) -> int: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names usable as values of `dataset_columns`."""

    @property
    def manifest_hash(self) -> str:
        """Hex digest that changes when any shard's name, size or index does."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Number of samples per shard, in shard order; rows are numbered through the shards."""

    @property
    def shard_digests(self) -> Sequence[str]:
        """Hex digest of every shard's index, in shard order: names what exact token counts belong to."""

    @property
    def files(self) -> Sequence[tuple[str, str]]:
        """Name and hex digest of every file (or table) that the source consists of: what a person can put back."""

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Length facts per row: [len(rows)] of `FACTS_DTYPE`."""

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the shard of each row, and its row within the whole shard: two int64 [len(rows)]."""

    def will_read(self, rows: NDArray[np.int64]) -> None:
        """Be told which rows this process's ranks will read soon, nearest first; a hint that never fails."""

    def origin(self, index: int) -> SampleOrigin:
        """Where a sample comes from, without reading it."""

    def read(self, index: int) -> RawSample:
        """Read one sample's bytes.

        Raises:
            SkipSample: this sample is damaged.
            DataError: the storage fails (missing file, I/O error): not the sample's fault.
        """


@dataclass(frozen=True, slots=True)
class Layout:
    """Today's ranks, in node-major order; they decide how a step is cut, never which samples it has."""

    world_size: int = 1
    ranks_per_node: int = 1  # 0: nodes differ


@dataclass(frozen=True, slots=True)
class PackBudget:
    """What one pack may hold.

    Attributes:
        max_tokens: of the language model, as planned.
        max_patches: of the vision tower, as planned; None: no limit.
        headroom: share by which the real lengths may exceed the plan before samples are left out.
    """

    max_tokens: int
    max_patches: int | None = None
    headroom: float = 0.1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: its micro-batches, dealt to the ranks in rows of one each.

    Attributes:
        step: number, from 0.
        epoch: epochs consumed when this step is done.
        micro_batches: of all ranks.
        pack: micro-batches are packs: one row of tokens, samples one after the other; None: padded rows.
        world_size: for how many ranks it was cut; None: for any number.
    """

    step: int
    epoch: float
    micro_batches: tuple[tuple[SampleRef | None, ...], ...]
    pack: PackBudget | None = None
    world_size: int | None = None

    def for_rank(self, rank: int, world_size: int) -> list[MicroBatchJob]:
        """This rank's share, the same number of micro-batches on every rank (the last may be empty).

        Every other row is dealt backwards: micro-batches may come longest first, and no rank is to have always the
        longer ones.
        """
        if self.world_size not in (None, world_size):
            raise ValueError(f"step {self.step} was cut for {self.world_size} ranks, not for {world_size}")
        count = -(-len(self.micro_batches) // world_size)
        indices = [m * world_size + (rank if m % 2 == 0 else world_size - 1 - rank) for m in range(count)]
        return [
            MicroBatchJob(self.step, i, self.micro_batches[i] if i < len(self.micro_batches) else (), pack=self.pack)
            for i in indices
        ]


@dataclass(frozen=True, slots=True)
class Condemned:
    """A slot whose sample must not be touched again: it crashed or hung its decoder, more than once."""

    slot: int
    null_class: str
    message: str


@dataclass(frozen=True, slots=True)
class MicroBatchJob:
    """What a worker is asked to materialise."""

    step: int
    micro_batch: int  # index within the step over all ranks: seeds dropout, so that it does not depend on the rank
    refs: tuple[SampleRef | None, ...]
    purpose: Literal["train", "eval", "generate"] = "train"  # which materialiser of the workers makes it
    pack: PackBudget | None = None
    condemned: tuple[Condemned, ...] = ()  # slots that are left empty
    suspects: tuple[int, ...] = ()  # slots that are tried first: should they fail again, little is lost


@dataclass(frozen=True, slots=True)
class NullSlot:
    """A slot that was emptied by the materialiser, and why."""

    origin: SampleOrigin | None
    null_class: str
    message: str


@dataclass(slots=True)
class MicroBatch:
    """One forward pass. B rows (samples and dummies), T tokens.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels: `input_ids [B, T]`, `attention_mask [B, T]`,
            visual tensors as the family has them. A pack has B = 1, `position_ids` that begin again with each sample,
            no attention mask, and its borders: `cu_seq_lens` int32 [segments + 1], `max_seq_len` a number.
        labels: [B, T] int64; `label_masking.ignore_index` marks tokens without loss. Column 0 is always so, so that
            the number of targets is the same before and after the shift by one.
        num_target_tokens: labels that carry loss.
        num_tokens: real tokens of the samples, without padding and without dummies.
        num_computed_tokens: B x T.
        num_reduced: samples whose images or clips were made smaller to fit max_length.
        num_cut: samples whose text was cut at max_length.
        sample_tokens: real tokens of each sample, in the order of `refs`.
        sample_targets: labels that carry loss of each sample; read row by row, the labels come in this order.
        kinds: of "image" and "video", what the samples have; whatever else `inputs` show is a dummy's.
    """

    job: MicroBatchJob
    inputs: dict[str, Any]
    labels: Tensor
    num_samples: int
    num_target_tokens: int
    num_tokens: int
    num_computed_tokens: int
    null_slots: list[NullSlot] = field(default_factory=list)
    origins: list[SampleOrigin] = field(default_factory=list)
    refs: list[SampleRef] = field(default_factory=list)  # of the same samples as `origins`
    references: list[str] = field(default_factory=list)  # the answers, for evaluation by generation; else empty
    other_references: list[tuple[str, ...]] = field(default_factory=list)  # what is right too, of the same samples
    num_reduced: int = 0
    num_cut: int = 0
    sample_tokens: list[int] = field(default_factory=list)
    sample_targets: list[int] = field(default_factory=list)
    kinds: frozenset[str] = frozenset()
