"""AnswerText: what a request's updates add to the text of its choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from octavo_engine.text.assemble import make_assembler
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import CompletionDelta, Request, SequenceUpdate


class AnswerText:
    """Turns the engine's updates for a request into what its caller asked for.

    Args:
        text: the model's text side.
        request: what is answered.
        stop: called with the number of a choice that a stop string has ended, which the engine cannot see.
    """

    def __init__(self, text: TextProcessor, request: Request, stop: Callable[[int], None]) -> None:
        self._stream = text.stream(request)
        self._assembler = make_assembler(request.sampling)
        self._stop = stop

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return self._stream.finished

    def push(self, updates: Iterable[SequenceUpdate]) -> list[CompletionDelta]:
        """Take in updates; return what is to be shown of them, which may be nothing."""
        deltas = []
        for update in updates:
            delta = self._stream.push(update)
            if delta is None:
                continue
            if update.finish_reason is None and delta.finish_reason is not None:
                self._stop(delta.index)
            deltas.append(delta)
        return deltas if self._assembler is None else self._assembler.take(deltas)
