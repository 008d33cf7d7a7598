"""A chat's answers on the wire: the message of a choice, whole or as a stream's deltas, with reasoning and calls."""

from __future__ import annotations

import uuid
from typing import Any

from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.events import CallBegin, Content, Event, Reasoning
from octavo_engine.types import FinishReason
from octavo_server.choices import Piece

Delta = dict[str, Any]


class ChatAnswer:
    """One choice of a chat as it grows.

    Args:
        parser: finds reasoning and calls in its text; None takes all text for content.
        names_call: whether the caller has named the function; an answer then ends as any text does.
    """

    def __init__(self, parser: AnswerParser | None, *, names_call: bool = False) -> None:
        self._parser = parser
        self._names_call = names_call
        self._num_calls = 0

    def deltas(self, piece: Piece) -> tuple[list[Delta], str | None]:
        """Return what a piece adds to the message, and why the choice has ended, if it has."""
        deltas = [self._delta(event) for event in events_of(self._parser, piece)]
        reason = piece.finish_reason
        if reason is FinishReason.STOP and self._num_calls and not self._names_call:
            return deltas, "tool_calls"
        return deltas, None if reason is None else reason.value

    def message(self, piece: Piece) -> tuple[dict[str, Any], str | None]:
        """Return the message of a choice that came in one piece, and why it has ended."""
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        deltas, reason = self.deltas(piece)
        calls: list[dict[str, Any]] = []
        for delta in deltas:
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
            for name in ("content", "reasoning_content"):
                if name in delta:
                    message[name] = (message.get(name) or "") + delta[name]
        if calls:
            message["tool_calls"] = calls
        elif message["content"] is None:
            message["content"] = ""
        return message, reason

    def _delta(self, event: Event) -> Delta:
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text}
        if isinstance(event, CallBegin):
            self._num_calls += 1
            function = {"name": event.name, "arguments": ""}
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            call = {"index": self._num_calls - 1, "id": call_id, "type": "function", "function": function}
        else:
            call = {"index": self._num_calls - 1, "function": {"arguments": event.text}}
        return {"tool_calls": [call]}


def events_of(parser: AnswerParser | None, piece: Piece) -> list[Event]:
    """Return what a parser finds in the next piece of an answer; without a parser all text is content."""
    if parser is None:
        return [Content(piece.text)] if piece.text else []
    events = parser.push(piece.text) if piece.text else []
    return events if piece.finish_reason is None else events + parser.finish()
