"""Runs an app on a socket until a signal: uvicorn, with limits on how slow and how broken a request may be."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from octavo_engine.errors import EngineDead, EngineStuck, InvalidConfig
from octavo_server.config import DRAIN_SECONDS
from octavo_server.drain import Drain
from octavo_server.endpoint import Endpoint, Tls
from octavo_server.errors import ApiError
from octavo_server.framing import QuickConnection
from octavo_server.outlet import WRITE_NOW

HEADER_BYTES = 64 << 10
HEADER_SECONDS = 20.0
IDLE_SECONDS = 75
CLOSE_SECONDS = 5  # for connections to take what was written to them
_LAST_WORDS_SECONDS = 0.1
_BACKLOG = 2048

_log = logging.getLogger(__name__)


class _Http(H11Protocol):
    """HTTP/1.1 that closes a connection whose headers do not come, and answers a broken request in OpenAI's shape."""

    _header_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn: QuickConnection = QuickConnection(h11.SERVER, HEADER_BYTES)
        self._application, self.app = self.app, self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with a way to send parts of its answer without a task that waits for each."""
        scope["extensions"] = {**scope.get("extensions", {}), WRITE_NOW: partial(self._write_now, self.cycle)}
        await self._application(scope, receive, send)

    def _write_now(self, cycle: RequestResponseCycle, part: bytes) -> bool:
        if cycle.disconnected:
            return True  # nobody is there to read it
        if self.flow.write_paused or cycle.response_complete or cycle.scope["method"] == "HEAD":
            return False
        self.transport.write(self.conn.frame(part))
        return True

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
    """A server that drains on the first signal and ends on the second, quietly, so that whoever runs it can clean up.

    Args:
        config: uvicorn's.
        drain: knows the requests in progress.
        drain_seconds: within which they may end.
        check: raises EngineDead where the server shall not outlive the engine; None lets it answer that it has.
    """

    def __init__(
        self, config: uvicorn.Config, drain: Drain, drain_seconds: float, check: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self._check = check
        self._drain = drain
        self._drain_seconds = drain_seconds

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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Take a signal."""
        if self._drain.is_begun:
            self.should_exit = self.force_exit = True
        self._drain.begin(self._drain_seconds)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop, some times a second."""
        if self._check is not None and not self._drain.is_begun:
            try:
                self._check()
            except EngineStuck:
                pass
            except EngineDead as error:
                _log.error("the server ends, since %s", error)
                self._drain.begin(CLOSE_SECONDS)  # its requests have been told, and are about to tell their clients
        return await super().on_tick(counter) or self._drain.is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: what is still in progress is told so."""
        self._drain.begin(0)
        self._drain.end_all()
        await asyncio.sleep(0)
        if self.force_exit:
            await asyncio.sleep(_LAST_WORDS_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        InvalidConfig: if the address cannot be used; says why.
    """
    if not 0 <= port <= 65535:
        raise InvalidConfig(f"cannot listen on port {port}; choose another --port, from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InvalidConfig(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error


@contextmanager
def listen_at(path: Path) -> Generator[socket.socket, None, None]:
    """Listen on a Unix socket, which is removed at the end; one that a dead server left is replaced.

    Raises:
        InvalidConfig: if the path cannot be used; says why.
    """
    listening = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        listening.bind(str(path))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise InvalidConfig(f"cannot listen on the Unix socket {path}: {error}; choose another --uds") from error
    try:
        with listening:
            yield listening
    finally:
        path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


@contextmanager
def listen_on(endpoint: Endpoint) -> Generator[socket.socket, None, None]:
    """Listen where a server shall; the same errors as `listen` and `listen_at`."""
    with listen(endpoint.host, endpoint.port) if endpoint.uds is None else listen_at(endpoint.uds) as listening:
        yield listening


def allow_many_connections() -> None:
    """Raise this process's limit on open files as far as it may: each connection is one."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows, which has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def make_server(
    app: ASGIApp,
    *,
    drain: Drain | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    tls: Tls | None = None,
    check: Callable[[], None] | None = None,
) -> uvicorn.Server:
    """Return a server for an app; `run(sockets=[...])` serves until SIGINT or SIGTERM.

    Requests in progress have some seconds to end then, if the app's `drain` is given; a second signal does not wait.
    Where `check` is given, the server also ends when that raises EngineDead.
    """
    config = uvicorn.Config(
        app,
        http=_Http,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # RequestContext logs, and knows more
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        **(tls.options() if tls else {}),
    )
    return _Server(config, drain or Drain(), drain_seconds, check)
