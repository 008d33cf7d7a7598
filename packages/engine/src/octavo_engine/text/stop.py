"""StopMatcher: finds stop strings in text that comes in pieces, and holds back what could begin one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """Text that may be shown, and the stop string that ended it (None while it goes on)."""

    text: str
    stopped: str | None


class StopMatcher:
    """Watches one growing text for stop strings.

    The stop string that is complete first wins; of those that end at the same character, the longest. So the result
    does not depend on how the text is cut into pieces. Each character costs the same on average, however long the
    strings are (Knuth, Morris and Pratt 1977).

    Args:
        stops: The stop strings, none empty.
        include_stop: Whether the text that is shown ends with the stop string or before it.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        assert all(stops), "a stop string is empty"
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""

    @property
    def watches(self) -> bool:
        """Whether there is any stop string."""
        return bool(self._patterns)

    def feed(self, text: str) -> StopResult:
        """Take in more text and return what may be shown of it; after a stop, neither feed nor flush again."""
        if not self._patterns:
            return StopResult(text, None)
        buffer = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            complete = [pattern.text for pattern in self._patterns if pattern.advance(char)]
            if complete:
                stop = max(complete, key=len)
                return StopResult(buffer[: index if self._include_stop else index - len(stop)], stop)
        shown = len(buffer) - max(pattern.num_matched for pattern in self._patterns)
        self._held = buffer[shown:]
        return StopResult(buffer[:shown], None)

    def flush(self) -> str:
        """Return what was held back; for when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string and how many of its characters the end of the text matches."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def advance(self, char: str) -> bool:
        """Take in one character; return whether the whole string is there now."""
        matched = self.num_matched
        while matched and self.text[matched] != char:
            matched = self._borders[matched - 1]
        self.num_matched = matched + (self.text[matched] == char)
        return self.num_matched == len(self.text)


def _borders(text: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        length += text[i] == text[length]
        borders[i] = length
    return borders
