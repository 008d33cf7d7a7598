"""AnswerParser: the interface of what reads one answer while it comes, and how such a reading is driven."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from octavo_engine.text.parsers.events import CallBegin, Content, Event
from octavo_engine.text.parsers.reader import Reader, Reading


class AnswerParser(ABC):
    """Reads one answer. What it finds, joined, does not depend on how the text was cut into pieces."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._events: list[Event] = []
        self._reading: Reading[None] | None = self._read()

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read the whole answer and put out what is found."""

    def push(self, text: str) -> list[Event]:
        """Take in the next text and return what it brought."""
        self._reader.push(text)
        return self._go_on()

    def finish(self) -> list[Event]:
        """Say that the text has ended, and return what was held back."""
        self._reader.close()
        return self._go_on()

    def _put(self, event: Event) -> None:
        self._events.append(event)

    def _put_content(self, text: str) -> None:
        if text:
            self._put(Content(text))

    def _go_on(self) -> list[Event]:
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
        events, self._events = self._events, []
        return _joined(events)


def _joined(events: list[Event]) -> list[Event]:
    """Join texts of one kind that follow each other."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if last is not None and not isinstance(event, CallBegin) and type(event) is type(last):
            joined[-1] = replace(last, text=last.text + event.text)
        else:
            joined.append(event)
    return joined
