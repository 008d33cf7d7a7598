"""NamedCallParser: an answer that is nothing but the arguments of one function, which the caller has named."""

from __future__ import annotations

from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.events import CallArguments, CallBegin
from octavo_engine.text.parsers.reader import Reading


class NamedCallParser(AnswerParser):
    """Reads the arguments' JSON text.

    Args:
        name: of the function.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        super().__init__()

    def _read(self) -> Reading[None]:
        if (yield from self._reader.peek()):
            self._put(CallBegin(self._name))
        yield from self._reader.rest(lambda text: self._put(CallArguments(text)))
