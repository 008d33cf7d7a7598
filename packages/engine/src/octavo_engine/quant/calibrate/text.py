"""cut_text: sequences of tokens to calibrate on, and others to weigh the result by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octavo_engine.errors import InvalidConfig

_SHARE_KEPT = 5  # one of so many sequences


class CutText(NamedTuple):
    """Sequences of one length; none is in both."""

    calibration: list[list[int]]
    evaluation: list[list[int]]


def cut_text(
    token_ids: Sequence[int],
    *,
    num_sequences: int,
    length: int,
    num_evaluation: int,
    evaluation_ids: Sequence[int] | None = None,
) -> CutText:
    """Cut a text into sequences: some from all over it to calibrate on, its last ones to weigh by.

    Args:
        token_ids: of the text.
        num_sequences: to calibrate on, at most.
        length: of each, in tokens; what is left over is not used.
        num_evaluation: to weigh by, at most; of the same text no more than a fifth.
        evaluation_ids: of another text to weigh by; None takes the end of the first.

    Raises:
        InvalidConfig: if a text is shorter than one sequence.
    """
    pieces = _pieces(token_ids, length, "the text")
    if evaluation_ids is None:
        num_kept = min(num_evaluation, len(pieces) // _SHARE_KEPT)
        pieces, kept = pieces[: len(pieces) - num_kept], pieces[len(pieces) - num_kept :]
    else:
        kept = _pieces(evaluation_ids, length, "the text to weigh by")[:num_evaluation]
    return CutText(spread(pieces, num_sequences), kept)


def spread(pieces: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Return so many pieces from all over a text, or all if there are no more."""
    count = min(most, len(pieces))
    return [list(pieces[index * len(pieces) // count]) for index in range(count)]


def _pieces(token_ids: Sequence[int], length: int, what: str) -> list[list[int]]:
    if len(token_ids) < length:
        raise InvalidConfig(
            f"{what} has {len(token_ids)} tokens, a sequence takes {length}; give more text, or shorter sequences"
        )
    return [list(token_ids[start : start + length]) for start in range(0, len(token_ids) - length + 1, length)]
