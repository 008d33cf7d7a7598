"""Links: all connections of a rank with the others, and where it stands among them.

Ranks are counted group by group, from the last stage of the model back to the first, so that rank 0, which has the
requests, is where logits and hidden states come out. With two ranks in each of three stages:

    rank      0  1 | 2  3 | 4  5
    stage     2  2 | 1  1 | 0  0        `tensors` connects the ranks of a stage
    tp_rank   0  1 | 0  1 | 0  1        `stages` connects those of one tp_rank, `orders` all
"""

from __future__ import annotations

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from octavo_engine.parallel.channel import Channel, PostedChannel
from octavo_engine.parallel.group import Group

_MESSAGES_PER_STEP = 4  # copies, the step, logits, the best of them

_CPU = torch.device("cpu")


class Links:
    """The groups that a rank belongs to; those of a single rank are never connected.

    Args:
        rank: of this process, from 0.
        tp_size: ranks that split each layer.
        num_stages: that the layers are shared out among.
        max_sums: of the ranks of its stage; see `Group`.

    Attributes:
        rank: of this process.
        tensors: the ranks of its stage, for tensors on their devices.
        stages: those of the other stages that have the same parts of their layers; its ranks are numbers of stages.
        orders: all ranks, for numbers on the CPU.
    """

    def __init__(self, rank: int, tp_size: int, num_stages: int, *, max_sums: int = 1) -> None:
        self.rank = rank
        self.tensors = Group(rank % tp_size, tp_size, max_sums=max_sums)
        self.stages = Group(num_stages - 1 - rank // tp_size, num_stages)
        self.orders = Group(rank, tp_size * num_stages)

    @property
    def last_stage(self) -> range:
        """The other ranks of rank 0's stage."""
        return range(1, self.tensors.size)

    @property
    def earlier_stages(self) -> range:
        """The ranks of all stages but the last."""
        return range(self.tensors.size, self.orders.size)

    def channel(self) -> Channel:
        """Return where rank 0 tells the others what to do; with several stages it does not wait for them."""
        if self.stages.size == 1:
            return Channel(self.orders)
        return PostedChannel(self.orders, _MESSAGES_PER_STEP * self.stages.size)

    def connect(
        self, store: Store, device: torch.device, *, seconds: float, stage_seconds: float, host: str | None
    ) -> None:
        """Connect all ranks, which call this at the same time; see `Group.connect`.

        Args:
            store: where they find each other.
            device: of the rank's tensors.
            seconds: how long ranks wait for each other, here and within a layer.
            stage_seconds: how long stages do in a step: one computes all its layers before the next hears of it.
            host: the address of this rank's own network interface; None lets the backend choose.

        Raises:
            WorkerLost: one did not come.
        """
        groups = (
            (f"tensors/{self.stages.rank}", self.tensors, device, seconds),
            (f"stages/{self.tensors.rank}", self.stages, device, stage_seconds),
            ("orders", self.orders, _CPU, stage_seconds),
        )
        for name, group, where, patience in groups:
            if group.size > 1:
                own_store = PrefixStore(name, store)
                group.connect(own_store, where, seconds=seconds, message_seconds=patience, host=host)

    def disconnect(self) -> None:
        """Drop all connections; others that wait for this rank fail."""
        for group in (self.tensors, self.stages, self.orders):
            group.disconnect()

    def cut(self) -> None:
        """Let everything fail at once that waits here for another rank; see `Group.cut`."""
        for group in (self.tensors, self.stages, self.orders):
            group.cut()

    @property
    def are_connected(self) -> bool:
        """Whether the ranks have met, and rank 0 has not let go of them."""
        return self.orders.is_connected
