"""Group: ranks that compute a model together, as one of them sees it: sums, gathers, broadcasts, and tensors sent.

It stands on torch.distributed's process groups themselves, not on the one default group of a process: a program may
have a group of its own beside it, and several engines.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from octavo_engine.errors import WorkerLost

_FOR_EVER = timedelta(days=3650)
_CUT_TAG = 0x0C07


class _Sending(NamedTuple):
    """A tensor on its way to another rank: torch.distributed's handle, and the memory that is read meanwhile."""

    work: Any
    x: Tensor


class Group:
    """What some ranks of a model do together; all of them call the same operations, in the same order.

    Only `send` and `receive` are for two of them. It can be connected anew after a rank was lost: layers keep the
    group, not its connections.

    Args:
        rank: of this process, from 0.
        size: how many ranks there are.
        max_sums: that can be on their way at once on a CPU; others wait for them.

    Attributes:
        rank: of this process, from 0.
        size: how many ranks there are.
    """

    def __init__(self, rank: int, size: int, *, max_sums: int = 1) -> None:
        self.rank = rank
        self._max_sums = max_sums
        self.size = size
        self._backend: Any = None
        self._patience: timedelta | None = None
        self._on_their_way: deque[_Sending] = deque()
        self._while_summing: Callable[[], None] | None = None

    def connect(
        self, store: Store, device: torch.device, *, seconds: float, message_seconds: float, host: str | None
    ) -> None:
        """Connect all ranks, which call this at the same time.

        Args:
            store: where they find each other; one prefix for each group.
            device: of the tensors: gloo moves those of a CPU, NCCL those of a GPU.
            seconds: how long ranks wait for each other, here and in every operation of all of them.
            message_seconds: how long for what one of them sends to another.
            host: the address of this rank's own network interface; None lets the backend choose.

        Raises:
            WorkerLost: a rank did not come.
        """
        try:
            if device.type == "cuda":
                self._backend = self._nccl(store, timedelta(seconds=max(seconds, message_seconds)))
                self._patience = None  # with one the host would wait, and not the device alone
            else:
                self._backend = self._gloo(store, timedelta(seconds=seconds), host)
                self._patience = timedelta(seconds=message_seconds)
        except RuntimeError as error:
            raise WorkerLost(f"the ranks could not connect within {seconds:g} s: {error}") from error

    def _nccl(self, store: Store, wait: timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = wait
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)

    def _gloo(self, store: Store, wait: timedelta, host: str | None) -> Any:
        gloo: Any = dist.ProcessGroupGloo  # its options have no annotations
        options = gloo._Options()
        options._devices = [gloo.create_default_device() if host is None else gloo.create_device(hostname=host)]
        options._timeout = wait
        options._threads = self._max_sums
        return gloo(store, self.rank, self.size, options)

    def send(self, x: Tensor, rank: int, *, max_on_their_way: int) -> None:
        """Begin to send x to a rank, which may take its time to receive it.

        Args:
            x: contiguous, and not written to any more.
            rank: which receives it.
            max_on_their_way: how many tensors may not have been received yet; with more, wait for the oldest.

        Raises:
            WorkerLost: as for `sum`.
        """
        while len(self._on_their_way) >= max_on_their_way:
            self._wait(lambda: self._on_their_way[0].work, self._patience)
            self._on_their_way.popleft()
        self._on_their_way.append(_Sending(self._do(lambda: self._backend.send([x], rank, 0)), x))

    def receive(self, x: Tensor, rank: int, *, patient: bool = False) -> None:
        """Overwrite x, contiguous, with the next tensor of its shape that a rank has sent here.

        Args:
            x: of the shape that was sent.
            rank: which sent it.
            patient: whether to wait as long as it takes.

        Raises:
            WorkerLost: as for `sum`.
        """
        self._wait(lambda: self._backend.recv([x], rank, 0), _FOR_EVER if patient else self._patience)

    def disconnect(self) -> None:
        """Drop the connections; others that wait for this rank fail."""
        self._on_their_way.clear()
        self._backend = None

    def cut(self) -> None:
        """Let everything fail at once that waits here for another rank, in whatever thread, and all that comes."""
        backend = self._backend
        if backend is None or self.size == 1:
            return
        if backend.name() == "nccl":
            backend.abort()
            return
        # gloo's own abort ends nothing. What it waits for in vain for however short a time closes all its connections.
        with contextlib.suppress(RuntimeError):
            backend.recv([torch.empty(1)], (self.rank + 1) % self.size, _CUT_TAG).wait(timedelta(milliseconds=1))

    @property
    def is_connected(self) -> bool:
        """Whether the ranks have met, and rank 0 has not let go of them."""
        return self._backend is not None

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' x, which has one shape everywhere, in new memory and in x's dtype.

        On a CPU the addends come in the order of ranks, in fp32, whatever the shape is: gloo's own sum takes them in an
        order that depends on where an element lies, so that a token would depend on the tokens beside it.

        Raises:
            WorkerLost: a rank has ended, or did not answer in time.
        """
        if x.device.type == "cuda":
            total = x.clone()
            self._wait_for_sum(lambda: self._backend.allreduce([total]))
            return total
        parts = list(x.new_empty((self.size, *x.shape)).unbind())
        own = x.contiguous()
        self._wait_for_sum(lambda: self._backend.allgather([parts], [own]))
        added = parts[0].float()
        for part in parts[1:]:
            added += part
        return added.to(x.dtype)

    @contextmanager
    def while_summing(self, act: Callable[[], None]) -> Iterator[None]:
        """Call `act` in every `sum` when the sum is on its way, before it is waited for."""
        self._while_summing = act
        try:
            yield
        finally:
            self._while_summing = None

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return all ranks' x, which has one shape everywhere, at rank 0, and nothing elsewhere.

        Raises:
            WorkerLost: as for `sum`.
        """
        parts = list(x.new_empty((self.size, *x.shape)).unbind()) if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        own = x.contiguous()
        self._wait(lambda: self._backend.gather([parts] if parts else [], [own], options))
        return parts

    def broadcast(self, x: Tensor, *, patient: bool = False) -> None:
        """Overwrite x, contiguous, with that of rank 0.

        Args:
            x: of one shape everywhere.
            patient: whether to wait for rank 0 as long as it takes.

        Raises:
            WorkerLost: as for `sum`.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        if patient:
            options.timeout = _FOR_EVER
        self._wait(lambda: self._backend.broadcast([x], options))

    def scatter(self, parts: list[Tensor], own: Tensor) -> None:
        """Overwrite own, contiguous, with this rank's one of rank 0's parts; the others give none.

        Raises:
            WorkerLost: as for `sum`.
        """
        options = dist.ScatterOptions()
        options.rootRank = 0
        self._wait(lambda: self._backend.scatter([own], [parts] if parts else [], options))

    def _wait(self, start: Callable[[], Any], patience: timedelta | None = None) -> None:
        """Start an operation and wait for its end; None is as long as all ranks wait for each other.

        Its handle is in no variable. An error's traceback would keep that, and so the connections, and other ranks
        would not learn that this one has let go of them.
        """
        self._do(lambda: start().wait() if patience is None else start().wait(patience))

    def _wait_for_sum(self, start: Callable[[], Any]) -> None:
        if self._while_summing is None:
            self._wait(start)
            return
        works = [self._do(start)]  # in a list that is empty in the end: see `_wait`
        try:
            self._while_summing()
            self._do(lambda: works.pop().wait())
        finally:
            works.clear()

    def _do(self, operation: Callable[[], Any]) -> Any:
        if self._backend is None:
            raise WorkerLost("the ranks are not connected")
        try:
            return operation()
        except RuntimeError as error:
            raise WorkerLost(f"a rank has ended or does not answer: {error}") from error
