"""meet: connects each rank with each other one, for their pulses, by what they leave at their rendezvous."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable

from octavo_engine.errors import WorkerLost
from octavo_engine.parallel.address import INTERFACE, own_address
from octavo_engine.parallel.pulse import Loss, Pulse
from octavo_engine.parallel.rendezvous import Rendezvous

_NUM_HELLO_BYTES = 64
_HELLO_SECONDS = 2.0


def meet(
    rendezvous: Rendezvous, rank: int, size: int, on_loss: Callable[[Loss], None], *, seconds: float, wait: float
) -> Pulse:
    """Connect a rank with all others, which do so too, and begin to watch them.

    Who connects has to know a key that only the rendezvous tells, so that a stranger is nobody's rank.

    Args:
        rendezvous: of the ranks.
        rank: of this process.
        size: how many ranks there are.
        on_loss: see `Pulse`.
        seconds: see `Pulse`; that of rank 0 holds for all.
        wait: seconds within which all must have come.

    Raises:
        WorkerLost: one did not come, or cannot be reached from here.
    """
    if rank == 0:
        rendezvous.leave("pulse", json.dumps({"key": secrets.token_hex(_NUM_HELLO_BYTES // 4), "seconds": seconds}))
    agreed = json.loads(rendezvous.take("pulse"))
    until = time.monotonic() + wait
    connections: dict[int, socket.socket] = {}
    host = own_address(*rendezvous.address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=size) as listening:
        rendezvous.leave(f"pulse/{rank}", json.dumps([host, listening.getsockname()[1]]))
        try:
            for other in range(rank):
                at = tuple(json.loads(rendezvous.take(f"pulse/{other}")))
                connections[other] = _call(at, other, rank, agreed["key"], until)
            missing = set(range(rank + 1, size))
            while missing:
                found = _answer(listening, agreed["key"], missing, until)
                if found is not None:
                    connections[found[0]] = found[1]
                    missing.remove(found[0])
        except BaseException:
            for connection in connections.values():
                connection.close()
            raise
    return Pulse(connections, agreed["seconds"], on_loss)


def _call(at: tuple[str, int], other: int, rank: int, key: str, until: float) -> socket.socket:
    try:
        connection = socket.create_connection(at, timeout=max(0.1, until - time.monotonic()))
        connection.sendall(f"{key} {rank}".ljust(_NUM_HELLO_BYTES).encode())
    except OSError as error:
        raise WorkerLost(
            f"rank {rank} cannot reach rank {other} at {at[0]} port {at[1]}: {error}; where a machine has several "
            f"networks, {INTERFACE} names the interface to use"
        ) from error
    return connection


def _answer(listening: socket.socket, key: str, missing: set[int], until: float) -> tuple[int, socket.socket] | None:
    """Return the next rank that connects, and its connection; None if it was a stranger, whose is closed."""
    listening.settimeout(max(0.1, until - time.monotonic()))
    try:
        connection, _ = listening.accept()
    except TimeoutError as error:
        raise WorkerLost(f"rank {min(missing)} did not connect in time; its log says more") from error
    connection.settimeout(_HELLO_SECONDS)
    try:
        given, _, rank = connection.recv(_NUM_HELLO_BYTES, socket.MSG_WAITALL).decode().strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        given, rank = "", ""
    if hmac.compare_digest(given.encode(), key.encode()) and rank.isdigit() and int(rank) in missing:
        return int(rank), connection
    connection.close()
    return None
