"""One choice of an answer as it grows: its text, its log-probabilities, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.types import CompletionDelta, FinishReason, SamplingParams
from octavo_server.generation import ChoiceDeltas, Generation
from octavo_server.logprobs import LogprobTrack, TokenEntry


class Piece(NamedTuple):
    """A part of a choice that can be shown: a chunk of a stream, or the whole. `entries` None: none were asked for.

    `token_ids` are those that came since the last piece; some of their text may be held back. `begins` says that no
    piece of the choice came before. `stop_reason` is the stop string, or the caller's stop token, that ended it.
    """

    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here
    text: str
    entries: list[TokenEntry] | None
    finish_reason: FinishReason | None
    token_ids: Sequence[int] = ()
    begins: bool = True
    stop_reason: str | int | None = None


class Choice:
    """Collects deltas until they are taken as a piece.

    Args:
        index: the choice's number in the HTTP answer.
        sampling: of its request.
        tokenizer: of the model.
    """

    def __init__(self, index: int, sampling: SamplingParams, tokenizer: Tokenizer) -> None:
        self._index = index
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._begun = False
        self._track: LogprobTrack | None = None
        if sampling.logprobs is not None:
            self._track = LogprobTrack(tokenizer, skip_special_tokens=sampling.skip_special_tokens)

    def push(self, delta: CompletionDelta) -> None:
        """Take in what is new."""
        if delta.text:
            self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason
        if self._track is not None:
            self._track.push(delta)

    @property
    def has_news(self) -> bool:
        """True if there is text to show, or the end."""
        return bool(self._texts) or self.ended

    @property
    def ended(self) -> bool:
        """True once the end has come."""
        return self._finish_reason is not None

    def take(self) -> Piece:
        """Return, once, what has come since the last time."""
        text = "".join(self._texts)
        self._texts.clear()
        entries = None if self._track is None else self._track.take()
        token_ids, self._token_ids = self._token_ids, []
        begins, self._begun = not self._begun, True
        return Piece(self._index, text, entries, self._finish_reason, token_ids, begins, self._stop_reason)


def pieces(choices: Sequence[Choice], deltas: ChoiceDeltas) -> list[Piece]:
    """Take in what is new and return the pieces that can be shown, for a stream."""
    shown = []
    for index, delta in deltas:
        choice = choices[index]
        choice.push(delta)
        if choice.has_news:
            shown.append(choice.take())
    return shown


async def whole(generation: Generation, choices: Sequence[Choice]) -> list[Piece]:
    """Run a generation to its end and return its choices in order: all, but where a beam search found fewer."""

    def take(batch: ChoiceDeltas) -> None:
        for index, delta in batch:
            choices[index].push(delta)

    await generation.run(take)
    return [choice.take() for choice in choices if choice.ended]
