"""Rendezvous: where the ranks of a model find each other, and what they leave for each other to read before a step."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import NamedTuple

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from octavo_engine import errors
from octavo_engine.errors import EngineError, InvalidConfig, WorkerLost
from octavo_engine.parallel.address import own_address
from octavo_engine.parallel.links import Links


class Failure(NamedTuple):
    """Why a rank has ended; `is_consequence` if because another one did."""

    error: EngineError
    is_consequence: bool


class Rendezvous:
    """A small store over TCP, which rank 0 or torchrun serves, and the connections that are made by it.

    Args:
        host: of the store.
        port: of the store; 0 takes a free one, where it is served.
        serves: whether to serve it.
        seconds: how long to wait for rank 0.
        prefix: of all names in a store that serves others too.

    Raises:
        InvalidConfig: the port is in use, or the address is not this machine's.
        WorkerLost: rank 0 does not answer.
    """

    def __init__(self, host: str, port: int, *, serves: bool, seconds: float, prefix: str = "") -> None:
        self._host = host
        wait = timedelta(seconds=seconds)
        try:
            served = TCPStore(host, port, None, serves, wait_for_workers=False, timeout=wait)
        except RuntimeError as error:
            if serves:
                raise InvalidConfig(f"ranks cannot meet at {host} port {port}: {error}; choose another port") from error
            raise WorkerLost(f"nobody answers at {host} port {port} within {seconds:g} s: {error}") from error
        self._port = served.port
        self._store: Store = PrefixStore(prefix, served) if prefix else served

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for the other ranks."""
        return self._host, self._port

    def leave(self, name: str, text: str) -> None:
        """Leave something under a name."""
        self._store.set(name, text)

    def take(self, name: str) -> str:
        """Wait for what another rank leaves under a name.

        Raises:
            WorkerLost: it did not come in time, or rank 0 has ended.
        """
        try:
            left = self._store.get(name).decode()
        except RuntimeError as error:
            raise WorkerLost(f"waited for {name!r} in vain: {error}") from error
        return left

    def has(self, name: str) -> bool:
        """Return whether something was left under a name."""
        found: bool = self._store.check([name])
        return found

    def leave_failure(self, rank: int, error: Exception) -> None:
        """Tell rank 0 why a rank ends; it has been told when this returns."""
        text = json.dumps({"kind": type(error).__name__, "message": str(error)})
        self._store.set(f"failed/{rank}", text)
        self.has(f"failed/{rank}")  # the store answers in order, and what is set has no answer

    def failure(self, rank: int) -> Failure | None:
        """Return why a rank has ended, if it could tell; an error of this package keeps its type."""
        if not self.has(f"failed/{rank}"):
            return None
        told = json.loads(self.take(f"failed/{rank}"))
        kind = getattr(errors, told["kind"], None)
        if isinstance(kind, type) and issubclass(kind, EngineError):
            return Failure(kind(f"rank {rank}: {told['message']}"), kind is WorkerLost)
        return Failure(WorkerLost(f"rank {rank} has ended: {told['kind']}: {told['message']}"), False)

    def connect(self, links: Links, device: torch.device, seconds: float, stage_seconds: float) -> None:
        """Connect a rank with all others, which do so too.

        Args:
            links: not connected.
            device: of the rank's tensors.
            seconds: how long ranks wait for each other.
            stage_seconds: how long stages do, once they are connected.

        Raises:
            WorkerLost: one did not come.
        """
        host = own_address(*self.address)
        links.connect(self._store, device, seconds=seconds, stage_seconds=stage_seconds, host=host)
