"""Lobby: how ranks that were started again and again in one store find those that were started this time.

torchrun's store outlives the processes it starts, and the number of an attempt, as it tells it to them, can differ from
machine to machine: one restarts for a failure, which it counts, the other since somebody came back, which it does not.
So each rank that comes leaves a name of its own here, and the rank 0 that lives answers it with its round's place.
"""

from __future__ import annotations

import secrets

from octavo_engine.parallel.rendezvous import Rendezvous

PREFIX = "octavo/lobby"

_NUM_BYTES = 8


class Lobby:
    """Rank 0's side: it sends those who come to the place of its round, which is new.

    Args:
        host: of the store.
        port: of it.
        size: ranks.
        seconds: how long to wait for the store.

    Attributes:
        prefix: the place, a prefix in the store.
    """

    def __init__(self, host: str, port: int, size: int, *, seconds: float) -> None:
        self.prefix = f"octavo/{secrets.token_hex(_NUM_BYTES)}"
        self._rendezvous = Rendezvous(host, port, serves=False, seconds=seconds, prefix=PREFIX)
        self._seen = dict.fromkeys(range(1, size), "")

    def admit(self) -> None:
        """Answer those who have come since the last call."""
        for rank, seen in self._seen.items():
            if self._rendezvous.has(f"here/{rank}") and (name := self._rendezvous.take(f"here/{rank}")) != seen:
                self._rendezvous.leave(f"round/{name}", self.prefix)
                self._seen[rank] = name


def find_round(host: str, port: int, rank: int, *, seconds: float) -> str:
    """Wait for rank 0, and return the place of its round.

    Args:
        host: of the store.
        port: of it.
        rank: of this process.
        seconds: how long to wait.

    Raises:
        WorkerLost: rank 0 did not answer in time.
    """
    rendezvous = Rendezvous(host, port, serves=False, seconds=seconds, prefix=PREFIX)
    name = secrets.token_hex(_NUM_BYTES)
    rendezvous.leave(f"here/{rank}", name)
    return rendezvous.take(f"round/{name}")
