"""A fast tokenizer from a `tokenizer.model` file, without the sentencepiece library.

The library is no dependency of ours, and what transformers makes of such a file puts the added tokens of InternLM2 at
the end of the vocabulary instead of at the ids that its tokenizer_config.json gives them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` file says.

    Attributes:
        pieces: the vocabulary.
        is_bpe: merges pieces; else it weighs them (unigram).
        adds_space: puts a space before a text.
    """

    pieces: tuple[Piece, ...]
    is_bpe: bool
    adds_space: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model` file.

    Raises:
        ModelError: it is none.
    """
    pieces: list[Piece] = []
    kind, adds_space = 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                pieces.append(Piece(fields[1].decode(), score, fields.get(3, _NORMAL)))
            elif number == 2:
                kind = dict(_fields(value)).get(3, kind)
            elif number == 3:
                adds_space = bool(dict(_fields(value)).get(3, adds_space))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is not a SentencePiece model ({error!r}). Copy it again.") from error
    if not pieces:
        raise ModelError(f"{path} is not a SentencePiece model: it has no vocabulary. Copy it again.")
    return SentencePieceModel(tuple(pieces), kind == _BPE, adds_space)


def bpe_tokenizer(path: Path, added: Mapping[int, str], *, legacy: bool = False) -> Any:
    """Make the tokenizer of a `tokenizer.model` file whose added tokens stand where the model has its rows for them.

    Args:
        path: of the file.
        added: id -> special token; an id inside the vocabulary takes the place of the piece that is there, which is an
            unused one in all published checkpoints.
        legacy: puts the space before a text also after each special token.

    Returns:
        `tokenizers.Tokenizer`, without a post-processor.

    Raises:
        ModelError: the file is no such model, or the ids do not follow on the vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = read_sentencepiece(path)
    if not model.is_bpe:
        raise ModelError(f"{path}: only SentencePiece models of the kind BPE can be converted, this one is a unigram")
    texts = [added.get(i, piece.text) for i, piece in enumerate(model.pieces)]
    beyond = sorted(i for i in added if i >= len(texts))
    if beyond != list(range(len(texts), len(texts) + len(beyond))):
        raise ModelError(
            f"{path} has {len(texts)} pieces, but the added tokens have the ids {beyond[:8]}, which do not follow on "
            "them. tokenizer.model and added_tokens.json are not of one checkpoint."
        )
    vocabulary = {text: i for i, text in enumerate(texts)}
    whole = {text for text, piece in zip(texts, model.pieces, strict=True) if piece.kind not in (_NORMAL, _UNUSED)}
    whole |= set(added.values())
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(model, vocabulary, whole),
            unk_token=next((p.text for p in model.pieces if p.kind == _UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=any(piece.kind == _BYTE for piece in model.pieces),
        )
    )
    tokenizer.add_tokens(
        [
            AddedToken(texts[i], normalized=False, special=False)
            for i, piece in enumerate(model.pieces)
            if piece.kind == _USER_DEFINED and i not in added
        ]
    )
    specials = {i: p.text for i, p in enumerate(model.pieces) if p.kind in (_CONTROL, _UNKNOWN)} | dict(added)
    tokenizer.add_special_tokens([AddedToken(specials[i], normalized=False, special=True) for i in sorted(specials)])
    if model.adds_space:
        scheme = "always" if legacy else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.adds_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(model: SentencePieceModel, vocabulary: Mapping[str, int], whole: set[str]) -> list[tuple[str, str]]:
    """All pairs that make a piece, those that make the better piece first."""
    found: list[tuple[float, int, tuple[str, str]]] = []
    for piece in model.pieces:
        if piece.kind != _NORMAL or piece.text in whole:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in vocabulary and right in vocabulary and left not in whole and right not in whole:
                found.append((-piece.score, len(found), (left, right)))
    return [pair for *_, pair in sorted(found)]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message; what has a length stays bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        else:
            length = {1: 8, 5: 4}[wire]
        if position + length > len(data):
            raise ValueError("it ends in the midst of a field")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
