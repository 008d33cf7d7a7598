"""The output of a response as it grows: OpenAI's items, and the stream's events that tell of each change."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.events import CallBegin, Content, Event, Reasoning
from octavo_engine.types import FinishReason
from octavo_server.chat_answers import events_of
from octavo_server.choices import Piece
from octavo_server.logprobs import TokenNames, chat_logprobs

Change = tuple[str, dict[str, Any]]
"""(an event's type, its members but for the sequence number)"""

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class ResponseOutput:
    """The items of one response: what the model thought, said and called, in its order.

    Args:
        parser: finds reasoning and calls in its text; None takes all text for content.
        names: how tokens are named beside their log-probabilities.

    Attributes:
        items: those so far; the last one may still grow.
        num_reasoning_tokens: those of the pieces that were reasoning, marks included.
        finish_reason: why the output has ended; None before.
    """

    def __init__(self, parser: AnswerParser | None, names: TokenNames) -> None:
        self._parser = parser
        self._names = names
        self.items: list[dict[str, Any]] = []
        self.num_reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, piece: Piece) -> Iterator[Change]:
        """Take in a piece; return the changes that it makes."""
        logprobs = [] if piece.entries is None else chat_logprobs(piece.entries, self._names)["content"]
        for event in events_of(self._parser, piece):
            if not self._continues(event):
                yield from self._close("completed")
                yield from self._open(event)
            if isinstance(event, Content):
                yield self._extend(event.text, logprobs)
                logprobs = []  # a piece's belong to its first text
            elif not isinstance(event, CallBegin):
                yield self._extend(event.text, [])
        if self.items and self.items[-1]["type"] == "reasoning":
            self.num_reasoning_tokens += len(piece.token_ids)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            if not self.items:
                yield from self._open(Content(""))  # an answer of nothing is an empty message
            yield from self._close("completed" if piece.finish_reason is FinishReason.STOP else "incomplete")

    def break_off(self) -> None:
        """Mark the item that was growing, if one was, as incomplete."""
        if self.items and self.items[-1].get("status") == "in_progress":
            self.items[-1]["status"] = "incomplete"

    def _continues(self, event: Event) -> bool:
        if not self.items or isinstance(event, CallBegin) or self.items[-1]["status"] != "in_progress":
            return False
        return bool(self.items[-1]["type"] == _kind(event))

    def _open(self, event: Event) -> Iterator[Change]:
        kind, name = _kind(event), uuid.uuid4().hex
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{name}", "type": kind, "status": "in_progress"}
        if isinstance(event, CallBegin):
            item |= {"call_id": f"call_{uuid.uuid4().hex[:24]}", "name": event.name, "arguments": ""}
        elif isinstance(event, Reasoning):
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
        self.items.append(item)
        yield "response.output_item.added", {"output_index": self._index, "item": _copy(item)}
        if "content" in item:
            item["content"].append(_part(kind))
            yield "response.content_part.added", self._place() | {"part": _part(kind)}

    def _extend(self, text: str, logprobs: list[dict[str, Any]]) -> Change:
        item = self.items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
            return "response.function_call_arguments.delta", self._place() | {"delta": text}
        part = item["content"][0]
        part["text"] += text
        if item["type"] == "reasoning":
            return "response.reasoning_text.delta", self._place() | {"delta": text}
        part["logprobs"] += logprobs
        return "response.output_text.delta", self._place() | {"delta": text, "logprobs": logprobs}

    def _close(self, status: str) -> Iterator[Change]:
        """Close the open item, if there is one; only the last one can be incomplete."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return
        item, place = self.items[-1], self._place()
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", place | done
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                yield "response.reasoning_text.done", place | {"text": part["text"]}
            else:
                yield "response.output_text.done", place | {"text": part["text"], "logprobs": part["logprobs"]}
            yield "response.content_part.done", place | {"part": part}
        yield "response.output_item.done", {"output_index": self._index, "item": item}

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _place(self) -> dict[str, Any]:
        """Return where the last item is, as its events say it."""
        item = self.items[-1]
        place = {"item_id": item["id"], "output_index": self._index}
        return place if item["type"] == "function_call" else place | {"content_index": 0}


def _kind(event: Event) -> str:
    return {Content: "message", Reasoning: "reasoning"}.get(type(event), "function_call")


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as it is now: what grows in it is copied."""
    return item | {"content": list(item["content"])} if "content" in item else dict(item)
