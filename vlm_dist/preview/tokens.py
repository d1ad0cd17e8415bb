"""Token ids as a person reads them: text, special tokens, and runs of placeholders in one piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "special", "visual", "gap"]

#: Placeholders in a row that are shown one by one.
_FEW = 2
#: A letter may be made of several tokens; what is none after so many is shown as it is.
_MAX_TOKENS_PER_LETTER = 6
#: Pieces of one sample that are shown: its beginning and its end.
MAX_PIECES = 1600
_OF_THE_END = 600
_NO_LETTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that are shown together.

    Attributes:
        kind: "visual" stands for a run of placeholders, "gap" for what is not shown.
        text: of them all; of a run the name of its commonest token.
        first: place of the first in the sample.
        ids: of the tokens, of a run the distinct ones.
        count: number of tokens.
        has_loss: they carry loss.
        is_answer: they are the assistant's.
    """

    kind: Kind
    text: str
    first: int
    ids: tuple[int, ...]
    count: int
    has_loss: bool
    is_answer: bool


class TokenReader:
    """Cuts a sample's tokens into pieces.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)

    def pieces(
        self, ids: Sequence[int], has_loss: Sequence[bool], is_answer: Sequence[bool], is_visual: Sequence[bool]
    ) -> list[Piece]:
        """Cut; all arguments have one entry per token. Placeholders in a row become one piece."""
        found: list[Piece] = []
        place = 0
        while place < len(ids):
            end = self._end_of_run(ids, has_loss, is_visual, place)
            if end - place > _FEW:
                found.append(self._run(ids, has_loss, is_answer, place, end))
                place = end
                continue
            end = place + 1
            while end < len(ids) and not self._is_placeholder(ids, is_visual, end):
                end += 1
            found += self._texts(ids, has_loss, is_answer, place, end, is_visual)
            place = end
        return _shortened(found)

    def name(self, number: int) -> str:
        """A token's own name."""
        if number < 0:  # images of some families
            return f"<image {-number}>"
        return str(self._tokenizer.convert_ids_to_tokens(number))

    def _is_placeholder(self, ids: Sequence[int], is_visual: Sequence[bool], place: int) -> bool:
        return is_visual[place] and (ids[place] < 0 or ids[place] in self._special or not self._reads(ids[place]))

    def _reads(self, number: int) -> bool:
        """Whether a token says something, such as the time of a frame."""
        return not self.name(number).startswith("<")

    def _end_of_run(self, ids: Sequence[int], has_loss: Sequence[bool], is_visual: Sequence[bool], start: int) -> int:
        end = start
        while end < len(ids) and self._is_placeholder(ids, is_visual, end) and has_loss[end] == has_loss[start]:
            end += 1
        return end

    def _run(
        self, ids: Sequence[int], has_loss: Sequence[bool], is_answer: Sequence[bool], start: int, end: int
    ) -> Piece:
        numbers = Counter(ids[start:end])
        name = self.name(numbers.most_common(1)[0][0])
        return Piece("visual", name, start, tuple(numbers), end - start, has_loss[start], is_answer[start])

    def _texts(
        self,
        ids: Sequence[int],
        has_loss: Sequence[bool],
        is_answer: Sequence[bool],
        start: int,
        end: int,
        is_visual: Sequence[bool],
    ) -> list[Piece]:
        """Read tokens one by one, each in the light of those before it: a space may belong to either."""
        found: list[Piece] = []
        before = place = start  # ids[before:place] are known
        while place < end:
            if ids[place] < 0 or ids[place] in self._special:
                kind: Kind = "visual" if is_visual[place] else "special"
                stop, text = place + 1, self.name(ids[place])
                before = stop
            else:
                kind = "text"
                known = self._decode(ids[before:place])
                stop = place
                text = _NO_LETTER
                while text.endswith(_NO_LETTER) and stop < min(end, place + _MAX_TOKENS_PER_LETTER):
                    if ids[stop] in self._special:
                        break
                    stop += 1
                    text = self._decode(ids[before:stop])[len(known) :]
                before = place
            found.append(
                Piece(
                    kind, text, place, tuple(ids[place:stop]), stop - place, any(has_loss[place:stop]),
                    is_answer[place],
                )
            )  # fmt: skip
            place = stop
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shortened(pieces: list[Piece]) -> list[Piece]:
    """Beginning and end of a long text."""
    if len(pieces) <= MAX_PIECES:
        return pieces
    head, left_out, tail = pieces[: MAX_PIECES - _OF_THE_END], pieces[MAX_PIECES - _OF_THE_END :], []
    left_out, tail = left_out[:-_OF_THE_END], left_out[-_OF_THE_END:]
    count = sum(piece.count for piece in left_out)
    has_loss = any(piece.has_loss for piece in left_out)
    gap = Piece("gap", f"{count:,} tokens are not shown", left_out[0].first, (), count, has_loss, False)
    return [*head, gap, *tail]
