"""AsyncCommands: what callers want of an engine, on its way to the thread that steps it, and the answers back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from octavo_engine.errors import EngineDead, EngineError
from octavo_engine.types import SequenceUpdate

T = TypeVar("T")
Command = Callable[[], list[SequenceUpdate]]
"""Something for the engine's thread to do; returns what came of it."""


class AsyncCommands:
    """Commands wait here until the engine's thread takes them, in the order they came.

    Args:
        check_health: returns if that thread runs, raises the reason if not.
    """

    def __init__(self, check_health: Callable[[], None]) -> None:
        self._check_health = check_health
        self._commands: deque[Command] = deque()
        self._answers: set[Future[Any]] = set()  # asked for and not given
        self._wake = threading.Condition()
        self.is_closing = False
        """Whether the engine's thread is to end; only `close` writes it."""

    def __bool__(self) -> bool:
        """Return whether a command waits."""
        return bool(self._commands)

    async def ask(self, question: Callable[[], T]) -> T:
        """Ask the engine something, in its thread."""
        answer: Future[T] = Future()
        return await self.answered(answer, lambda: _answer(answer, question))

    async def answered(self, answer: Future[T], command: Command) -> T:
        """Wait for an answer that a command brings, or something that it sets going."""
        self._check_health()
        self._answers.add(answer)
        self.put(command)
        try:
            self._check_health()  # again: a loop that ended before the question stood there does not answer it
            return await asyncio.wrap_future(answer)
        finally:
            self._answers.discard(answer)

    def do(self, action: Callable[[], None]) -> None:
        """Let the engine do something that brings no updates, in its thread."""

        def command() -> list[SequenceUpdate]:
            action()
            return []

        self.put(command)

    def put(self, command: Command) -> None:
        """Add a command and wake the engine's thread."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def close(self) -> None:
        """Let the engine's thread end after what it is doing."""
        with self._wake:
            self.is_closing = True
            self._wake.notify()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def wait(self, has_work: Callable[[], bool]) -> bool:
        """Wait for a command or for work; return False once it is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self.is_closing or self._commands or has_work())
            return not self.is_closing

    def take(self) -> list[Command]:
        """Return the commands that wait; they do not wait any more."""
        with self._wake:
            commands = list(self._commands)
            self._commands.clear()
        return commands

    def fail(self, reason: EngineDead) -> None:
        """Tell all who wait for an answer that there will be none."""
        for answer in list(self._answers):
            if not answer.done():
                answer.set_exception(reason)


def _answer(answer: Future[T], question: Callable[[], T]) -> list[SequenceUpdate]:
    """Answer a question about the engine, in its thread, unless the asker has left."""
    if answer.set_running_or_notify_cancel():
        try:
            answer.set_result(question())
        except EngineError as error:
            answer.set_exception(error)
    return []
