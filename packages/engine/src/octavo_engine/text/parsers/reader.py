"""Reader: text that arrives in pieces, read as if it were all there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A reading that returns a T; it yields where it needs more text than has come."""

Emit = Callable[[str], None]


class Reader:
    """Its methods are readings: `result = yield from reader.method(...)`.

    What they return, and the text that they emit when joined, does not depend on how the text was cut into pieces.
    """

    def __init__(self) -> None:
        self._text = ""
        self._closed = False

    def push(self, text: str) -> None:
        """Add text."""
        self._text += text

    def close(self) -> None:
        """Say that no more text will come."""
        self._closed = True

    def peek(self, count: int = 1) -> Reading[str]:
        """Return the next `count` characters without taking them; fewer where the text ends."""
        while len(self._text) < count and not self._closed:
            yield
        return self._text[:count]

    def take(self, count: int = 1) -> Reading[str]:
        """Return the next `count` characters; fewer where the text ends."""
        taken = yield from self.peek(count)
        self._text = self._text[len(taken) :]
        return taken

    def skip_space(self) -> Reading[str]:
        """Take and return white space."""
        skipped = ""
        while (character := (yield from self.peek())) and character.isspace():
            skipped += yield from self.take()
        return skipped

    def skip(self, literal: str) -> Reading[bool]:
        """Take `literal` if it comes next, and say whether it did."""
        for count in range(1, len(literal) + 1):
            if (yield from self.peek(count)) != literal[:count]:
                return False  # without waiting for more than tells
        yield from self.take(len(literal))
        return True

    def skip_any(self, literals: Sequence[str]) -> Reading[str | None]:
        """Take and return whichever of some texts comes next; None if none does."""
        for literal in literals:
            if (yield from self.skip(literal)):
                return literal
        return None

    def rest(self, emit: Emit) -> Reading[None]:
        """Emit text to its end."""
        while True:
            _emit_some(emit, self._text)
            self._text = ""
            if self._closed:
                return
            yield

    def until(self, markers: Sequence[str], emit: Emit) -> Reading[str | None]:
        """Emit text up to the first of some markers, and take that; None if the text ends without one.

        White space before a marker is not emitted.
        """
        while True:
            found = min(((at, m) for m in markers if (at := self._text.find(m)) >= 0), default=None)
            if found is not None:
                at, marker = found
                _emit_some(emit, self._text[:at].rstrip())
                self._text = self._text[at + len(marker) :]
                return marker
            if self._closed:
                _emit_some(emit, self._text)
                self._text = ""
                return None
            sure = self._text[: self._sure_of(markers)].rstrip()
            _emit_some(emit, sure)
            self._text = self._text[len(sure) :]
            yield

    def _sure_of(self, markers: Sequence[str]) -> int:
        """Return how many characters come before what may be the beginning of a marker."""
        longest = max(map(len, markers))
        for start in range(max(len(self._text) - longest + 1, 0), len(self._text)):
            tail = self._text[start:]
            if any(marker.startswith(tail) for marker in markers):
                return start
        return len(self._text)


def _emit_some(emit: Emit, text: str) -> None:
    if text:
        emit(text)
