"""PreemptionPolicy: whether sequences that lose their blocks are swapped to the host or computed again later."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from octavo_kvcache import SwapSize

_log = logging.getLogger(__name__)

PREEMPTION_MODES = ("auto", "recompute", "swap")
"""`auto` takes what costs less; the others take one whatever it costs, `swap` for as long as the host has room."""

_KEPT = 0.9  # of what was observed before, at each new observation: the last ten or so count


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """What it takes to copy blocks from the device to the host or back, one way.

    Attributes:
        bytes_per_block: over all layers.
        bytes_per_second: once a copy runs.
        seconds_per_move: before it does, for any number of blocks.
    """

    bytes_per_block: int
    bytes_per_second: float
    seconds_per_move: float = 0.0

    def seconds(self, num_blocks: int) -> float:
        """Return what moving some blocks together takes."""
        return self.seconds_per_move + num_blocks * self.bytes_per_block / self.bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionStats:
    """How often which kind of preemption was chosen since the start, and what the choice goes by at the moment.

    `seconds_per_token` is what computing a token of a prompt takes, None before the first was; the other two are those
    of TransferCost, None without a host tier.
    """

    num_recomputed: int = 0
    num_swapped: int = 0
    seconds_per_token: float | None = None
    bytes_per_second: float | None = None
    seconds_per_move: float | None = None


class PreemptionPolicy:
    """Compares the seconds of copying blocks out and in with those of computing their tokens again.

    What a token costs is a running average over the steps that computed prompts, unless it is given. Before the first
    such step nothing can be preempted. Only the scheduler writes it.

    Args:
        transfer: what copies cost.
        block_size: tokens per block.
        mode: one of PREEMPTION_MODES.
        seconds_per_token: of a prompt; None measures it.
    """

    def __init__(
        self,
        transfer: TransferCost,
        block_size: int,
        *,
        mode: str = "auto",
        seconds_per_token: float | None = None,
    ) -> None:
        self._transfer = transfer
        self._block_size = block_size
        self._mode = mode
        self._given = seconds_per_token
        self._begun: deque[tuple[int, float]] = deque()  # of the steps in flight: prompt tokens, when submitted
        self._last_end = 0.0
        self._num_tokens = 0.0
        self._seconds = 0.0

    @property
    def seconds_per_token(self) -> float | None:
        """What a token of a prompt takes to compute; None if that is not known yet."""
        if self._given is not None or not self._num_tokens:
            return self._given
        return self._seconds / self._num_tokens

    def begin_step(self, num_tokens: int, num_rows: int, now: float) -> None:
        """Take note that a step is about to be submitted."""
        self._begun.append((num_tokens if num_tokens > num_rows else 0, now))

    def end_step(self, now: float) -> None:
        """Take note that the oldest step has ended; it began when it was submitted, or when the one before it ended."""
        num_tokens, submitted = self._begun.popleft()
        if num_tokens:
            self._num_tokens = _KEPT * self._num_tokens + num_tokens
            self._seconds = _KEPT * self._seconds + now - max(submitted, self._last_end)
        self._last_end = now

    def prefers_swap(self, size: SwapSize) -> bool:
        """Choose for sequences of a size: True to swap them."""
        if self._mode != "auto":
            return self._mode == "swap"
        per_token = self.seconds_per_token
        if per_token is None:
            return False
        swap = self._transfer.seconds(size.num_out) + self._transfer.seconds(size.num_in)
        recompute = size.num_lost * self._block_size * per_token
        _log.debug(
            "preemption: swapping %d blocks out and %d in takes %.6f s, computing %d blocks again %.6f s: %s",
            size.num_out,
            size.num_in,
            swap,
            size.num_lost,
            recompute,
            "swap" if swap < recompute else "recompute",
        )
        return swap < recompute

    def stats(self, num_recomputed: int, num_swapped: int) -> PreemptionStats:
        """Return what the choice goes by, beside how often which kind was chosen."""
        return PreemptionStats(
            num_recomputed=num_recomputed,
            num_swapped=num_swapped,
            seconds_per_token=self.seconds_per_token,
            bytes_per_second=self._transfer.bytes_per_second,
            seconds_per_move=self._transfer.seconds_per_move,
        )
