"""Pulse: which other ranks can be reached and are alive, as a thread of this process knows it, beside all computing.

A connection to each of them carries a byte a second. Whether the way to a machine is open is for the two kernels to
find out (TCP_USER_TIMEOUT of RFC 5482, keepalive of RFC 9293, section 3.8.4): they acknowledge bytes however busy their
processes are, so that neither a long step, nor code that holds the interpreter's lock, nor a process that is stopped
for a while looks like a cut link. A process that has ended closes its connection at once. One that lives but says
nothing for much longer hangs.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from octavo_engine.errors import RankUnreachable, WorkerLost

BEAT_SECONDS = 1.0
"""Between two bytes of a rank."""

_BEAT = b"."
_FAREWELL = b"q"
_NUM_BYTES = 4096

_log = logging.getLogger(__name__)


class Loss(NamedTuple):
    """That a rank was lost, and how, as the end of a sentence about it."""

    rank: int
    how: str
    is_unreachable: bool

    def error(self) -> WorkerLost:
        """Return it as an error."""
        kind = RankUnreachable if self.is_unreachable else WorkerLost
        return kind(f"rank {self.rank} {self.how}")


@dataclass(slots=True)
class _Peer:
    rank: int
    connection: socket.socket
    address: str
    heard_at: float


class Pulse:
    """Sends to some ranks and listens to them until it is closed. Only its own thread touches the connections.

    Args:
        connections: to the ranks that do the same at their ends; they belong to the pulse from now on.
        seconds: that the way to a rank's machine may be cut before the rank counts as lost.
        on_loss: called in the thread of the pulse, once for each rank that is lost.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        seconds: float,
        on_loss: Callable[[Loss], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._on_loss = on_loss
        self._clock = clock
        self._beat_seconds = min(BEAT_SECONDS, seconds / 4)
        self._patience: float | None = None
        self._selector = selectors.DefaultSelector()
        self._closing = self._says_farewell = False
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        for rank, connection in connections.items():
            set_patience(connection, seconds)
            connection.setblocking(False)
            peer = _Peer(rank, connection, connection.getpeername()[0], clock())
            self._peers[rank] = peer
            self._selector.register(connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="octavo-pulse", daemon=True)
        self._thread.start()

    def expect_beats(self, patience: float) -> None:
        """Count a rank as lost too that can be reached but says nothing for so many seconds; not before this call.

        While a rank loads, nobody should: reading a file can hold the interpreter's lock for long.
        """
        self._patience = patience

    def close(self, *, says_farewell: bool) -> None:
        """End: the others hear a farewell and do not miss this rank, or see the connection closed and do."""
        if self._closing:
            return
        self._says_farewell, self._closing = says_farewell, True
        self._wake.send(_BEAT)
        self._thread.join()
        self._wake.close()
        self._woken.close()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        due = self._clock()
        while not self._closing:
            for key, _ in self._selector.select(max(0.0, due - self._clock())):
                if key.data is not None:
                    self._hear(key.data)
            now = self._clock()
            if now >= due and not self._closing:
                self._look_for_silence(now, is_late=now - due > 2 * self._beat_seconds)
                self._send_all(_BEAT)
                due = now + self._beat_seconds
        if self._says_farewell:
            self._send_all(_FAREWELL)
        for peer in list(self._peers.values()):
            self._forget(peer)
        self._selector.close()

    def _hear(self, peer: _Peer) -> None:
        try:
            heard = peer.connection.recv(_NUM_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(peer, error)
            return
        peer.heard_at = self._clock()
        if _FAREWELL in heard:
            self._forget(peer)
        elif not heard:
            self._lose(peer, ConnectionResetError())

    def _send_all(self, byte: bytes) -> None:
        for peer in list(self._peers.values()):
            try:
                peer.connection.send(byte)
            except BlockingIOError:  # a process that reads nothing: it is missed for what it does not say
                continue
            except OSError as error:
                self._lose(peer, error)

    def _look_for_silence(self, now: float, *, is_late: bool) -> None:
        """Lose the ranks that have said nothing for long, unless this process was held up itself."""
        for peer in list(self._peers.values()):
            if is_late:
                peer.heard_at = now
            silence = now - peer.heard_at
            if self._patience is not None and silence > self._patience:
                how = f"says nothing for {silence:.0f} s, though {peer.address} can be reached: its process hangs"
                self._tell(peer, Loss(peer.rank, how, is_unreachable=False))

    def _lose(self, peer: _Peer, error: OSError) -> None:
        if isinstance(error, (ConnectionResetError, BrokenPipeError)):
            loss = Loss(peer.rank, f"has closed its connection ({peer.address}): its process ends", False)
        else:
            how = f"cannot be reached at {peer.address} for {self._seconds:g} s: {error.strerror or error}"
            loss = Loss(peer.rank, how, is_unreachable=True)
        self._tell(peer, loss)

    def _tell(self, peer: _Peer, loss: Loss) -> None:
        self._forget(peer)
        if not self._closing:
            self._on_loss(loss)

    def _forget(self, peer: _Peer) -> None:
        if self._peers.pop(peer.rank, None) is not None:
            self._selector.unregister(peer.connection)
            peer.connection.close()


def set_patience(connection: socket.socket, seconds: float) -> None:
    """Let the kernel break a connection off whose other end acknowledges nothing for some seconds.

    Where it has no TCP_USER_TIMEOUT (macOS), it keeps to its own, longer time while bytes are on their way.
    """
    options = {
        "TCP_NODELAY": 1,
        "TCP_USER_TIMEOUT": round(seconds * 1000),
        "TCP_KEEPIDLE": 1,
        "TCP_KEEPINTVL": 1,
        "TCP_KEEPCNT": max(1, round(seconds) - 1),
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
