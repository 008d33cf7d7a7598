"""Answers in the terminal: one prompt, or a conversation, streamed from an engine in this process."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from octavo_engine.api import EngineClient
from octavo_engine.errors import InvalidRequest
from octavo_engine.types import Request
from octavo_server.mapping import chat_request, completion_requests
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.completions import CompletionBody

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


@dataclass(frozen=True, slots=True)
class Answer:
    """A text as it was streamed, and how fast; times in seconds."""

    text: str
    num_tokens: int
    first_token: float
    total: float

    @property
    def speed(self) -> str:
        """How fast it came, in words."""
        rate = (self.num_tokens - 1) / (self.total - self.first_token) if self.num_tokens > 1 else 0.0
        return f"{self.num_tokens} tokens, first after {self.first_token:.2f} s, then {rate:.1f} tokens/s"


async def stream_chat(
    engine: EngineClient, messages: list[dict[str, Any]], options: dict[str, Any], write: Callable[[str], None]
) -> Answer:
    """Answer a conversation; `options` are fields of a chat completion.

    Raises:
        pydantic.ValidationError: if an option is out of range.
        InvalidRequest: if the conversation cannot be answered.
    """
    body = ChatBody.model_validate({"messages": messages, **options})
    return await _stream(engine, await chat_request(body, engine.text, request_id=_new_id(), max_n=1), write)


async def stream_completion(
    engine: EngineClient, prompt: str, options: dict[str, Any], write: Callable[[str], None]
) -> Answer:
    """Go on from a text, without a chat template; otherwise like `stream_chat`."""
    body = CompletionBody.model_validate({"prompt": prompt, **options})
    requests = await completion_requests(body, engine, request_id=_new_id(), max_n=1)
    return await _stream(engine, requests[0], write)


async def _stream(engine: EngineClient, request: Request, write: Callable[[str], None]) -> Answer:
    texts: list[str] = []
    num_tokens = 0
    started = first = time.monotonic()
    async with aclosing(engine.generate(request)) as batches:
        async for batch in batches:
            for delta in batch:
                if not num_tokens:
                    first = time.monotonic()
                num_tokens = delta.num_tokens
                texts.append(delta.text)
                write(delta.text)
    return Answer("".join(texts), num_tokens, first - started, time.monotonic() - started)


def _new_id() -> str:
    return f"terminal-{uuid.uuid4().hex}"


@dataclass(slots=True)
class Conversation:
    """A conversation at the terminal; only `run` writes its messages."""

    engine: EngineClient
    console: Console
    options: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Read lines and answer them until the user ends it."""
        self.console.print(_HELP, style="dim")
        self._reset()
        while True:
            try:
                line = self.console.input("[bold]> [/bold]").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line == "/exit":
                return
            if line == "/reset":
                self._reset()
            elif line.startswith("/"):
                self.console.print(_HELP, style="dim")
            elif line:
                self._answer(line)

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def _answer(self, line: str) -> None:
        said: list[str] = []

        def write(text: str) -> None:
            said.append(text)
            self.console.out(text, end="", highlight=False)

        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            answer = asyncio.run(stream_chat(self.engine, asked, self.options, write))
        except InvalidRequest as error:
            self.console.print(f"{error} (/reset forgets the conversation)", style="red", markup=False)
            return
        except KeyboardInterrupt:
            self.console.print(" …", style="dim")
        else:
            self.console.print()
            self.console.print(answer.speed, style="dim")
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
