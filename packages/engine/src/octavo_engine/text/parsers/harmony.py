"""HarmonyParser: gpt-oss's answers, messages on channels: analysis is reasoning, final is the answer, others call."""

from __future__ import annotations

import re

from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.events import CallArguments, CallBegin, Event, Reasoning
from octavo_engine.text.parsers.reader import Reading

HINT = "<|channel|>"
"""What the chat template of such a model contains."""

MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
"""All marks of the format."""

_HEADS = ("<|start|>", "<|channel|>")
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


class HarmonyParser(AnswerParser):
    """Reads answers in the harmony format; the prompt has ended with the header's beginning, `<|start|>assistant`.

    A text without any channel is content.

    Args:
        max_num_calls: calls behind that are left out; None takes all.
    """

    def __init__(self, *, max_num_calls: int | None = None) -> None:
        self._max_num_calls = max_num_calls
        self._num_calls = 0
        super().__init__()

    def _read(self) -> Reading[None]:
        while True:
            space = yield from self._reader.skip_space()
            head = yield from self._reader.skip_any(_HEADS)
            if head is None:
                self._put_content(space)
                yield from self._reader.rest(self._put_content)
                return
            header: list[str] = [head]
            if (yield from self._reader.until((_MESSAGE,), header.append)) is None:
                return
            yield from self._read_message("".join(header))

    def _read_message(self, header: str) -> Reading[None]:
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient is not None:
            self._num_calls += 1
            self._put_call(CallBegin(recipient.group(1)))
            marker = yield from self._reader.until(_ENDS, lambda text: self._put_call(CallArguments(text)))
        elif channel is not None and channel.group(1) == "analysis":
            marker = yield from self._reader.until(_ENDS, lambda text: self._put(Reasoning(text)))
        else:
            marker = yield from self._reader.until(_ENDS, self._put_content)
        if marker == "<|start|>":  # a message that was not closed; the next header has begun
            header_rest: list[str] = ["<|start|>"]
            if (yield from self._reader.until((_MESSAGE,), header_rest.append)) is not None:
                yield from self._read_message("".join(header_rest))

    def _put_call(self, event: Event) -> None:
        if self._max_num_calls is None or self._num_calls <= self._max_num_calls:
            self._put(event)
