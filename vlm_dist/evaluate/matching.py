"""Scores of one answer against one reference, as the makers of the tasks define them; each is between 0 and 1."""

from __future__ import annotations

#: Relative error that relaxed accuracy forgives.
RELAXED_ERROR = 0.05
#: ANLS gives nothing for an answer of which so much, or more, would have to be changed.
ANLS_THRESHOLD = 0.5


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: case folded, white space collapsed, ends stripped."""
    return " ".join(text.casefold().split())


def exact_match(answer: str, reference: str) -> float:
    """Whether the two are the same, but for case and white space."""
    return float(normalise_answer(answer) == normalise_answer(reference))


def relaxed_match(answer: str, reference: str) -> float:
    """ChartQA's relaxed accuracy: a number may be wrong by 5%, anything else must be the same.

    Masry et al., "ChartQA" (2022), section 5.1, in the form in which it is usually computed (`relaxed_correctness` of
    Pix2Struct, Lee et al. 2023): `12%` is 0.12; a reference of 0, and a number with a comma for its thousands, is text.
    """
    ours, theirs = _number(answer), _number(reference)
    if ours is None or not theirs:
        return exact_match(answer, reference)
    return float(abs(ours - theirs) / abs(theirs) <= RELAXED_ERROR)


def anls(answer: str, reference: str) -> float:
    """DocVQA's normalised Levenshtein similarity; its mean is ANLS, with threshold 0.5.

    Biten et al., "Scene Text Visual Question Answering" (2019), equation 1: 1 less the share of characters that would
    have to be changed, of the longer of the two; 0 where that is half of them or more.
    """
    from rapidfuzz.distance import Levenshtein

    share: float = Levenshtein.normalized_distance(normalise_answer(answer), normalise_answer(reference))
    return 1 - share if share < ANLS_THRESHOLD else 0.0


def _number(text: str) -> float | None:
    """What a text says, if it is a number or a percentage."""
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
