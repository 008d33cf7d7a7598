"""Channel: what rank 0 tells the other ranks to do, as whole numbers: commands, steps and copies of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.parallel.group import Group
from octavo_engine.runner.model_input import GroupInput, KVLayer, ModelInput
from octavo_kvcache import DEVICE, HOST, BlockCopy

_NUM_NUMBERS = 6
_TIERS = (DEVICE, HOST)


class Command(IntEnum):
    """What all ranks do next, rank 0 included."""

    STOP = 0
    ALLOCATE = 1
    COPY = 2
    STEP = 3
    LOGITS = 4
    GREEDY = 5
    SLOTS = 6
    ADAPTER = 7


class Message(NamedTuple):
    """A command with its sizes, and whole numbers as many as it wants.

    payload: [any] int64, on the CPU.
    """

    command: Command
    numbers: tuple[int, ...] = ()
    payload: Tensor | None = None


class Channel:
    """One message after the other from rank 0 to all others.

    Args:
        group: of tensors on the CPU. Those who listen wait as long as rank 0 has nothing to say.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def send(self, message: Message, ranks: range | None = None) -> None:
        """Tell others.

        Args:
            message: for them.
            ranks: which they are; None for all.

        Raises:
            WorkerLost: one does not listen any more.
        """
        assert len(message.numbers) <= _NUM_NUMBERS
        payload = message.payload
        head = torch.zeros(2 + _NUM_NUMBERS, dtype=torch.int64)
        head[: 2 + len(message.numbers)] = torch.tensor(
            [message.command, 0 if payload is None else len(payload), *message.numbers]
        )
        self._give(head, ranks)
        if payload is not None and len(payload):
            self._give(payload, ranks)

    def deal(self, parts: Sequence[bytes]) -> None:
        """Give each other rank its own bytes, in the order of ranks; all have one length.

        Raises:
            WorkerLost: one does not listen any more.
        """
        own = torch.zeros(len(parts[0]), dtype=torch.uint8)
        others = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
        self._group.scatter([own, *others], own)

    def take(self, num_bytes: int) -> bytes:
        """Return what rank 0 deals to this rank.

        Raises:
            WorkerLost: rank 0 has ended.
        """
        own = torch.empty(num_bytes, dtype=torch.uint8)
        self._group.scatter([], own)
        return own.numpy().tobytes()

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            WorkerLost: rank 0 has ended.
        """
        head = torch.zeros(2 + _NUM_NUMBERS, dtype=torch.int64)
        self._take(head, patient=True)
        command, num_payload, *numbers = head.tolist()
        payload = torch.empty(num_payload, dtype=torch.int64)
        if num_payload:
            self._take(payload, patient=False)
        return Message(Command(command), tuple(numbers), payload)

    def _give(self, x: Tensor, ranks: range | None) -> None:
        assert ranks is None, "all hear a broadcast"
        self._group.broadcast(x)

    def _take(self, x: Tensor, *, patient: bool) -> None:
        self._group.broadcast(x, patient=patient)


class PostedChannel(Channel):
    """A Channel on which rank 0 does not wait until the others listen, which may be at work on earlier messages.

    Args:
        group: as for `Channel`.
        max_on_their_way: messages that a rank may have before it.
    """

    def __init__(self, group: Group, max_on_their_way: int) -> None:
        super().__init__(group)
        self._max_on_their_way = 2 * max_on_their_way * (group.size - 1)  # heads and payloads

    def _give(self, x: Tensor, ranks: range | None) -> None:
        for rank in range(1, self._group.size) if ranks is None else ranks:
            self._group.send(x, rank, max_on_their_way=self._max_on_their_way)

    def _take(self, x: Tensor, *, patient: bool) -> None:
        self._group.receive(x, 0, patient=patient)


def step_message(model_input: ModelInput) -> Message:
    """Return a step's input as a message."""
    groups = model_input.groups
    tensors = [
        model_input.token_ids,
        model_input.positions,
        model_input.query_start_loc,
        model_input.seq_lens,
        model_input.logits_indices,
        *(tensor for group in groups for tensor in (group.block_table, group.slot_mapping)),
    ]
    num_blocks = groups[0].block_table.shape[1] if groups else 0
    numbers = (
        len(model_input.token_ids),
        len(model_input.seq_lens),
        len(model_input.logits_indices),
        num_blocks,
        len(groups),
        model_input.max_query_len,
    )
    return Message(Command.STEP, numbers, torch.cat([tensor.reshape(-1).to("cpu", torch.int64) for tensor in tensors]))


def step_input(message: Message, kv_layers: tuple[KVLayer, ...], device: torch.device) -> ModelInput:
    """Return the input of a step that a message describes, on a rank's own caches."""
    assert message.payload is not None
    num_tokens, num_seqs, num_logits, num_blocks, num_groups, max_query_len = message.numbers
    sizes = [num_tokens, num_tokens, num_seqs + 1, num_seqs, num_logits]
    sizes += [num_seqs * num_blocks, num_tokens] * num_groups
    token_ids, positions, starts, seq_lens, logits_indices, *rest = torch.split(message.payload.to(device), sizes)
    return ModelInput(
        token_ids=token_ids,
        positions=positions,
        query_start_loc=starts.int(),
        seq_lens=seq_lens.int(),
        max_query_len=max_query_len,
        logits_indices=logits_indices,
        groups=tuple(
            GroupInput(table.int().view(num_seqs, num_blocks), slots)
            for table, slots in zip(rest[::2], rest[1::2], strict=True)
        ),
        kv_layers=kv_layers,
    )


def copies_message(copies: Sequence[BlockCopy]) -> Message:
    """Return copies of blocks as a message."""
    rows = [(c.src, c.dst, _TIERS.index(c.src_tier), _TIERS.index(c.dst_tier)) for c in copies]
    return Message(Command.COPY, (), torch.tensor(rows, dtype=torch.int64).reshape(-1))


def copies_of(message: Message) -> list[BlockCopy]:
    """Return the copies that a message describes."""
    assert message.payload is not None
    rows = message.payload.view(-1, 4).tolist()
    return [BlockCopy(src, dst, _TIERS[src_tier], _TIERS[dst_tier]) for src, dst, src_tier, dst_tier in rows]
