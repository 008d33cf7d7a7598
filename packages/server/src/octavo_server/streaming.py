"""Server-sent events: how a chunk is written, and how a stream of them is sent until the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo_server.errors import ApiError, to_api_error
from octavo_server.exchange import current_exchange
from octavo_server.generation import cancel_all, wait_for_disconnect
from octavo_server.protocol.generation import StreamOptions

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    """Return a value as compact JSON; NaN and infinity are our own mistakes and raise ValueError."""
    return _encode(value).encode()


def json_response(value: Any) -> Response:
    """Return a JSON answer."""
    return Response(to_json(value), media_type="application/json")


class ChunkWriter:
    """Writes the chunks of one stream: id, model and time are encoded once, for all of them.

    Args:
        head: the members that every chunk repeats.
        options: what the client wants besides the choices.
        usage: gives the usage so far.
    """

    def __init__(
        self, head: Mapping[str, Any], options: StreamOptions | None, usage: Callable[[], dict[str, Any]]
    ) -> None:
        self._head = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._usage = usage
        self._wants_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)

    def chunk(self, choice: Mapping[str, Any], members: Mapping[str, Any] | None = None) -> bytes:
        """Return an event with one choice, and further members beside the choices."""
        usage = b""
        if self._continuous:
            usage = b',"usage":' + to_json(self._usage())
        elif self._wants_usage:
            usage = b',"usage":null'
        beside = b"," + to_json(members)[1:-1] if members else b""
        # A choice's only floats are its log-probabilities: without them nothing can be NaN, and a quicker encoder does.
        encoded = pydantic_core.to_json(choice) if choice.get("logprobs") is None else to_json(choice)
        return self._head + encoded + b"]" + beside + usage + b"}\n\n"

    def end(self) -> bytes:
        """Return what stands after the last choice: the usage, if it was asked for, and the end mark."""
        if not self._wants_usage:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage()) + b"}\n\n" + DONE


class EventStream(Response):
    """A response of server-sent events; when the client leaves, the events' generator is closed at once.

    An error after the start becomes one last event in OpenAI's error shape, without an end mark.

    Args:
        events: whole events, as bytes.
        keep_alive: seconds of silence after which a comment is sent.
        error_event: writes an error after the start.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive: float,
        error_event: Callable[[ApiError], bytes] = lambda error: b"data: " + to_json(error.body()) + b"\n\n",
    ) -> None:
        self._error_event = error_event
        self._events = events
        self._keep_alive = keep_alive
        self._clock = asyncio.get_running_loop().time
        self._last_sent = 0.0
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        exchange = current_exchange()
        if exchange is not None and exchange.send is not None:
            send = exchange.send  # every token passes there
        self._last_sent = self._clock()
        pump = asyncio.create_task(self._pump(send))
        others = [asyncio.create_task(wait_for_disconnect(receive)), asyncio.create_task(self._ping(send))]
        try:
            await asyncio.wait({pump, others[0]}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        except asyncio.CancelledError:
            if exchange is not None and exchange.ended_by is not None:  # the client is there, and is told why
                await cancel_all([pump, *others])
                await self._end(send, exchange.ended_by)
            raise
        finally:
            await cancel_all([pump, *others])

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    self._last_sent = self._clock()
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:  # the boundary: the status is sent, so the error becomes an event
                await self._end(send, to_api_error(error))
                return
        await self._end(send)

    async def _end(self, send: Send, error: ApiError | None = None) -> None:
        self._last_sent = self._clock()
        event = b"" if error is None else self._error_event(error)
        await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            silence = self._clock() - self._last_sent
            if silence >= self._keep_alive:
                self._last_sent = self._clock()
                await send({"type": "http.response.body", "body": _PING, "more_body": True})
            await asyncio.sleep(self._keep_alive - min(silence, self._keep_alive) or self._keep_alive)
