"""An answer as Anthropic's content blocks: collected, or as the events of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.events import CallArguments, CallBegin, Content, Event, Reasoning
from octavo_engine.types import FinishReason
from octavo_server.chat_answers import events_of
from octavo_server.choices import Piece
from octavo_server.streaming import to_json


def sse(kind: str, **members: Any) -> bytes:
    """Return a named event."""
    return f"event: {kind}\ndata: ".encode() + to_json({"type": kind, **members}) + b"\n\n"


class Blocks:
    """The content blocks of one answer as they grow.

    Args:
        parser: finds reasoning and calls in its text; None takes all text for content.

    Attributes:
        content: the blocks so far.
        stop_reason: why the answer has ended; None before.
        stop_sequence: the stop string that ended it; None if none did.
    """

    def __init__(self, parser: AnswerParser | None) -> None:
        self._parser = parser
        self._input = ""  # of the open call
        self.content: list[dict[str, Any]] = []
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None

    def push(self, piece: Piece) -> Iterator[bytes]:
        """Take in a piece; return the events that tell of it."""
        for event in events_of(self._parser, piece):
            if not self._continues(event):
                yield from self._close()
                yield self._open(event)
            if not isinstance(event, CallBegin):
                yield self._extend(event)
        if piece.finish_reason is not None:
            yield from self._close()
            self._end(piece)

    def _continues(self, event: Event) -> bool:
        return bool(self.content) and not isinstance(event, CallBegin) and self.content[-1]["type"] == _kind(event)

    def _open(self, event: Event) -> bytes:
        if isinstance(event, CallBegin):
            block: dict[str, Any] = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": event.name}
            block["input"] = {}
        elif isinstance(event, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self.content.append(block)
        return sse("content_block_start", index=len(self.content) - 1, content_block=block)

    def _extend(self, event: Event) -> bytes:
        block = self.content[-1]
        assert not isinstance(event, CallBegin)
        if isinstance(event, CallArguments):
            self._input += event.text
            delta = {"type": "input_json_delta", "partial_json": event.text}
        else:
            name = _kind(event)
            block[name] += event.text
            delta = {"type": f"{name}_delta", name: event.text}
        return sse("content_block_delta", index=len(self.content) - 1, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if not self.content:
            return
        if self.content[-1]["type"] == "tool_use":
            self.content[-1]["input"], self._input = _object(self._input), ""
        yield sse("content_block_stop", index=len(self.content) - 1)

    def _end(self, piece: Piece) -> None:
        if piece.finish_reason is FinishReason.LENGTH:
            self.stop_reason = "max_tokens"
        elif isinstance(piece.stop_reason, str):
            self.stop_reason, self.stop_sequence = "stop_sequence", piece.stop_reason
        else:
            called = any(block["type"] == "tool_use" for block in self.content)
            self.stop_reason = "tool_use" if called else "end_turn"


def _kind(event: Event) -> str:
    return {Content: "text", Reasoning: "thinking", CallArguments: "tool_use"}.get(type(event), "")


def _object(text: str) -> dict[str, Any]:
    """Return the arguments of a call; none where the text was cut off within them."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
