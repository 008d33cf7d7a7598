"""Runs an app on a socket until a signal: uvicorn, with limits on how slow and how broken a request may be."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo_engine.errors import InvalidConfig
from octavo_server.errors import ApiError

HEADER_BYTES = 64 << 10
HEADER_SECONDS = 20.0
IDLE_SECONDS = 75
SHUTDOWN_SECONDS = 15


class _Http(H11Protocol):
    """HTTP/1.1 that closes a connection whose headers do not come, and answers a broken request in OpenAI's shape."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(400, msg, code="bad_http").body()).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_headers(self) -> None:
        """Run the timer while the client has begun a request, or a connection, and owes the rest of the headers."""
        owes = self.conn.their_state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if not owes:
            self._stop_watching()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class _Server(uvicorn.Server):
    """A server that ends quietly on a signal, so that whoever runs it can clean up."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Let SIGINT and SIGTERM end the server; unlike uvicorn's own, they are not raised again afterwards."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        InvalidConfig: if the address cannot be used; says why.
    """
    if not 0 <= port <= 65535:
        raise InvalidConfig(f"cannot listen on port {port}; choose another --port, from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidConfig(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error


def make_server(app: ASGIApp, *, access_log: bool = False) -> uvicorn.Server:
    """Return a server for an app; `run(sockets=[...])` serves until SIGINT or SIGTERM.

    Streams in progress have some seconds to end; a second SIGINT does not wait for them.
    """
    config = uvicorn.Config(
        app,
        http=_Http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return _Server(config)
