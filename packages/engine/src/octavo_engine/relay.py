"""Relay: how what the engine's thread brings for a request is handed on at once, without a task that wakes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from octavo_engine.errors import EngineError
from octavo_engine.text.answer import AnswerText
from octavo_engine.types import CompletionDelta, SequenceUpdate


@dataclass(slots=True)
class Relay:
    """Makes text of a request's updates in the call that brings them; used on its event loop only.

    A step of many requests is one pass over their relays. With a task for each, the loop would change from one to the
    next, and what a task is made of would come out of memory anew: the model has filled the caches meanwhile.

    Attributes:
        loop: where it is used.
        answer: the request's text.
        take: is given what is new. An exception of its own ends the request.
        ended: done once the answer has ended, with what went wrong if something did.
    """

    loop: asyncio.AbstractEventLoop
    answer: AnswerText
    take: Callable[[list[CompletionDelta]], None]
    ended: asyncio.Future[None]

    def put(self, update: SequenceUpdate | EngineError) -> None:
        """Hand on what an update brings, or end with the error."""
        if self.ended.done():
            return  # nobody reads it any more
        if isinstance(update, EngineError):
            self.ended.set_exception(update)
            return
        try:
            if deltas := self.answer.push([update]):
                self.take(deltas)
        except Exception as error:  # the boundary: an answer that cannot be taken harms no other
            self.ended.set_exception(error)
            return
        if self.answer.finished:
            self.ended.set_result(None)
