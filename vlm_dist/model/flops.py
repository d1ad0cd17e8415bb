"""Floating-point operations of a micro-batch: right for LoRA, for frozen towers, and for pictures.

A linear layer of p weights costs 2p per token forward, 2p more for the gradient of its input, if anything before it
is trained, and 2p more for that of its weight, if that is trained. Each layer is counted with the tokens that it sees:
those of the text, the patches of a picture, or what patches are merged to. Formulas: docs/estimate.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm_dist.model.attention.choice import attention_of
from vlm_dist.model.attention.names import CU_SEQ_LENS, VARLEN
from vlm_dist.model.checkpointing import base_model
from vlm_dist.model.flop_parts import Attention, Product, model_parts
from vlm_dist.model.visual_tokens import VisualTokens, visual_layout

#: What the backward of attention costs, as a multiple of the forward: two products for each of its two; kernels that
#: keep no scores compute these once more.
_BACKWARD, _FUSED_BACKWARD = 2.0, 2.5
#: Inputs of a vision tower, where pictures and clips come apart.
_OF_PICTURES, _OF_CLIPS = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward.

    Attributes:
        model: what the samples need: without padding and dummies, without what is computed again, attention over each
            sample's own tokens alone and, where a token sees only those before it, half of the square.
        hardware: what is computed: with padding and dummies, with what gradient checkpointing and the loss compute
            again, with what DoRA computes besides, and with the whole square of a row where the attention masks instead
            of leaving out (variable-length attention leaves out what is between the samples of a pack, flash attention
            padding, too).
    """

    model: float
    hardware: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a micro-batch's text, media placeholders included.

    Attributes:
        real: without padding.
        computed: with padding.
        segments: length of each sample (of each row where samples are not packed), without padding.
        computed_squares: sum of the squares of the rows' lengths, with padding: what attention with a mask computes.
        is_packed: samples share a row.
    """

    real: int
    computed: int
    segments: tuple[int, ...]
    computed_squares: float
    is_packed: bool = False


@dataclass(frozen=True)
class SampleShare:
    """What the samples of a micro-batch have of it; the rest stands in for what they lack.

    Attributes:
        tokens: of each sample.
        kinds: of "image" and "video", those that a sample has.
    """

    tokens: tuple[int, ...]
    kinds: frozenset[str]

    def text(self, whole: TextTokens) -> TextTokens:
        """Tokens of the samples alone."""
        return replace(whole, real=sum(self.tokens), segments=self.tokens)

    def visual_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs without the dummy of a kind that no sample has."""
        if not self.kinds:
            return {}
        # where clips come among the pictures, both are of the samples
        absent: tuple[str, ...] = () if "image" in self.kinds or _OF_CLIPS[0] not in inputs else _OF_PICTURES
        absent += () if "video" in self.kinds else _OF_CLIPS
        return {key: value for key, value in inputs.items() if key not in absent}


class FlopModel:
    """Counts the operations of micro-batches from their shapes; made once, by `of`.

    Args:
        products: matrix products of the model, per token.
        attentions: attention of its layers.
        layout: how many patches a picture has.
        implementation: of the language model's attention.
        of_pictures: of the vision tower's.
        ignore_index: marks positions without a label.
    """

    def __init__(
        self,
        products: tuple[Product, ...],
        attentions: tuple[Attention, ...],
        layout: Any,
        implementation: str | None,
        ignore_index: int,
        of_pictures: str | None = None,
    ) -> None:
        self.products = products
        self.attentions = attentions
        self._layout = layout
        self._leaves_padding_out = "flash" in (implementation or "")
        self._leaves_others_out = self._leaves_padding_out or implementation == VARLEN
        self._leaves_pictures_out = "flash" in (of_pictures or "")
        self._fused = implementation != "eager"
        self._ignore_index = ignore_index
        self._model: dict[str, float] = defaultdict(float)  # stream -> operations per token
        self._hardware: dict[str, float] = defaultdict(float)
        self._beside_tokens = sum(product.hardware_flops_beside_tokens for product in products)
        for product in products:
            self._model[product.stream] += product.model_flops
            self._hardware[product.stream] += product.hardware_flops
        self._squares: dict[tuple[str, int | None], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for attention in attentions:
            forward = 4.0 * attention.width
            backward = forward * attention.has_backward
            again = forward * attention.is_recomputed
            sums = self._squares[attention.kind, attention.window]
            sums[0] += forward + _BACKWARD * backward
            sums[1] += forward + (_FUSED_BACKWARD if self._fused else _BACKWARD) * backward + again

    @property
    def packs_need_mask(self) -> bool:
        """Whether attention is told by a mask what not to see of a pack."""
        return not self._leaves_others_out

    @classmethod
    def of(cls, model: Any, ignore_index: int = -100) -> FlopModel:
        """Read a model's layers: what they are, what is trained, what is computed again.

        Nothing is computed and no weight is read: the model may be on the meta device, in 4 bits, or partitioned.

        Args:
            model: with its adapter, with gradient checkpointing as it will be trained.
            ignore_index: marks positions without a label.
        """
        base = base_model(model)
        products, attentions = model_parts(base)
        language, vision = attention_of(base)
        return cls(products, attentions, visual_layout(base), language, ignore_index, vision)

    def count(self, inputs: Mapping[str, Any], labels: Any, share: SampleShare | None = None) -> Flops:
        """Operations of a micro-batch, forward and backward.

        Args:
            inputs: of the model, before they go to a device; of pictures only shapes are read, and where one is padded.
            labels: [B, T], on the CPU.
            share: of the samples; None: all that is no padding is theirs.
        """
        text = text_tokens(inputs, labels)
        visual = self._layout.tokens(inputs)
        num_labelled = int((labels[:, 1:] != self._ignore_index).sum())
        computed = self.count_tokens(text, visual, num_labelled)
        if share is None or sum(share.tokens) == text.real:  # nothing is a dummy's
            return computed
        needed = self._layout.tokens(share.visual_inputs(inputs))
        return Flops(self.count_tokens(share.text(text), needed, num_labelled).model, computed.hardware)

    def count_tokens(self, text: TextTokens, visual: VisualTokens, num_labelled: int) -> Flops:
        """Operations of a micro-batch of which only the counts are known.

        Args:
            text: of the language model.
            visual: of the vision tower.
            num_labelled: positions with a label.
        """
        streams = visual.streams
        real = {"language": text.real, "head": num_labelled, **streams}
        computed = {"language": text.computed, "head": num_labelled, **streams}
        model = sum(flops * real.get(stream, 0) for stream, flops in self._model.items())
        hardware = sum(flops * computed.get(stream, 0) for stream, flops in self._hardware.items())
        hardware += self._beside_tokens
        for (kind, window), (per_model, per_hardware) in self._squares.items():
            if kind == "causal":
                pairs = _causal_pairs(text.segments, window)
                model += per_model * pairs
                is_exact = self._leaves_others_out if text.is_packed else self._leaves_padding_out
                hardware += per_hardware * (pairs if is_exact else text.computed_squares)
            else:
                model += per_model * visual.squares.get(kind, 0.0)
                dense = visual.dense_squares if not self._leaves_pictures_out else None
                hardware += per_hardware * (visual.squares.get(kind, 0.0) if dense is None else dense)
        return Flops(float(model), float(hardware))


def text_tokens(inputs: Mapping[str, Any], labels: Any) -> TextTokens:
    """Tokens of the language model, and the samples that they belong to.

    Args:
        inputs: of the model; padded rows have an `attention_mask` [B, T], packed ones `cu_seq_lens` [segments + 1].
        labels: [B, T].
    """
    rows, length = labels.shape
    mask, borders = inputs.get("attention_mask"), inputs.get(CU_SEQ_LENS)
    if mask is not None and mask.dim() == 2:
        segments = tuple(int(count) for count in mask.sum(1).tolist())
    elif borders is not None:
        segments = tuple(borders.diff().tolist())
    else:
        segments = (length,) * rows
    return TextTokens(sum(segments), rows * length, segments, float(rows) * length**2, borders is not None)


def _causal_pairs(segments: tuple[int, ...], window: int | None) -> float:
    """Pairs of tokens of which one sees the other, to half a token."""
    if window is None:
        return sum(length * length for length in segments) / 2
    return sum(length**2 / 2 if length <= window else length * window - window**2 / 2 for length in segments)
