"""DualBatch: computes a step as two halves in turns, each while the sums of the other are on their way.

A rank of a split model waits twice a layer for the others. With two halves of a step it computes one of them while the
other waits, as DeepSeek-V3 overlaps communication with two micro-batches (arXiv 2412.19437, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from threading import Semaphore, local

import torch
from torch import Tensor

from octavo_engine.parallel.group import Group
from octavo_engine.runner.model_input import ModelInput

Compute = Callable[[ModelInput, slice], Tensor]
"""From a part of a step's input, and which of the step's tokens it is, to their hidden states."""


def at_once(compute: Compute, model_input: ModelInput) -> Tensor:
    """Compute a step in one piece: [num_tokens, hidden_size]."""
    return compute(model_input, slice(0, len(model_input.token_ids)))


class Turns:
    """Two threads of which one runs at a time, until it passes on; both pass on as often.

    So both of them call a group's operations in one order, the same on every rank.
    """

    def __init__(self) -> None:
        self._may_run = (Semaphore(1), Semaphore(0))
        self._failure: BaseException | None = None
        self._local = local()

    @contextmanager
    def of(self, half: int) -> Iterator[None]:
        """Run as one of the two, 0 or 1; 0 begins. The other one goes on when this ends.

        What one of them raises, the other one raises too, since its ranks would wait for nobody.
        """
        self._local.half = half
        self._may_run[half].acquire()
        try:
            self._check()
            yield
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._may_run[1 - half].release()

    def pass_on(self) -> None:
        """Let the other one run up to where it passes on, or to its end."""
        half = self._local.half
        self._may_run[1 - half].release()
        self._may_run[half].acquire()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


class DualBatch:
    """Runs steps of a rank, those with many tokens as two halves.

    Args:
        group: the ranks that add up their parts of the model.
        min_tokens: that a step must have to be halved; two at least.
    """

    def __init__(self, group: Group, min_tokens: int) -> None:
        self._group = group
        self._min_tokens = max(2, min_tokens)
        self._thread = ThreadPoolExecutor(1, "dual-batch")
        self.num_halved = 0

    def run(self, compute: Compute, model_input: ModelInput) -> Tensor:
        """Compute a step: [num_tokens, hidden_size].

        Raises:
            WorkerLost: a rank has ended, or does not answer.
        """
        num_tokens = len(model_input.token_ids)
        if num_tokens < self._min_tokens:
            return at_once(compute, model_input)
        self.num_halved += 1
        turns = Turns()
        middle = num_tokens // 2
        first, second = halves(model_input, middle)
        with self._group.while_summing(turns.pass_on):
            rest = self._thread.submit(_other_half, turns, compute, second, slice(middle, num_tokens), _stream(first))
            try:
                with turns.of(0):
                    hidden = compute(first, slice(0, middle))
            finally:
                rest.exception()  # the thread must be done with the group
        return torch.cat([hidden, rest.result()])


def _other_half(
    turns: Turns, compute: Compute, model_input: ModelInput, tokens: slice, stream: torch.cuda.Stream | None
) -> Tensor:
    with torch.inference_mode(), torch.cuda.stream(stream), turns.of(1):
        return compute(model_input, tokens)


def _stream(model_input: ModelInput) -> torch.cuda.Stream | None:
    """Return this thread's stream on a GPU, which another thread would not go by."""
    device = model_input.token_ids.device
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def halves(model_input: ModelInput, middle: int) -> tuple[ModelInput, ModelInput]:
    """Cut a step before its token number `middle`; a sequence it cuts in two is one of both, as two chunks of a prompt.

    The second half attends to what the first has written, layer by layer. Logits are not wanted of either.
    """
    starts = model_input.query_start_loc.tolist()
    cut = next(i for i, stop in enumerate(starts[1:]) if stop > middle)  # the sequence with the token
    num_first = cut + (starts[cut] < middle)
    seq_lens = model_input.seq_lens[:num_first].clone()
    if num_first > cut:
        seq_lens[cut] -= starts[cut + 1] - middle
    return (
        _part(
            model_input, slice(0, middle), slice(0, num_first), [*starts[: cut + 1], middle][: num_first + 1], seq_lens
        ),
        _part(
            model_input,
            slice(middle, None),
            slice(cut, None),
            [0, *(start - middle for start in starts[cut + 1 :])],
            model_input.seq_lens[cut:],
        ),
    )


def _part(model_input: ModelInput, tokens: slice, rows: slice, starts: list[int], seq_lens: Tensor) -> ModelInput:
    """Return some tokens of a step; its rows' tokens begin at `starts`, and they are `seq_lens` long after them."""
    return replace(
        model_input,
        token_ids=model_input.token_ids[tokens],
        positions=model_input.positions[tokens],
        query_start_loc=model_input.query_start_loc.new_tensor(starts),
        seq_lens=seq_lens,
        max_query_len=max(stop - start for start, stop in pairwise(starts)),
        logits_indices=model_input.logits_indices[:0],
        groups=tuple(
            group._replace(block_table=group.block_table[rows], slot_mapping=group.slot_mapping[tokens])
            for group in model_input.groups
        ),
    )
