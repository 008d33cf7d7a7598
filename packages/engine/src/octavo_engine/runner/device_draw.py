"""DeviceDraw: how the tokens of a step are drawn where nobody may wait for the host to see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.runner.rules.base import LogitChange
from octavo_engine.runner.sampling_rows import SamplingBatch
from octavo_kernels import sample_tokens

_ARRAYS = ("temperature", "top_k", "top_p", "min_p", "seeds", "sequence_index", "positions")


class DrawnLater(NamedTuple):
    """A draw on the device.

    Attributes:
        token_ids: [draws] int64; any token where `best` is not finite.
        best: [draws] fp32, the largest logits that were drawn from.
        given: [draws] fp32, the largest logits before they were changed; None if nothing changes them.
    """

    token_ids: Tensor
    best: Tensor
    given: Tensor | None


@dataclass(frozen=True, slots=True)
class DeviceDraw:
    """The draw of one step; its tensors are on the device.

    Attributes:
        shared: [draws] int64, which row of hidden states each goes by; None if each has its own.
        options: of `sample_tokens`; empty for the plain arg-max.
        changes: what is done to the logits before.
    """

    shared: Tensor | None
    options: dict[str, Tensor]
    changes: tuple[LogitChange, ...]

    def __call__(
        self,
        hidden: Tensor,
        greedy: Callable[[Tensor], tuple[Tensor, Tensor]],
        make_logits: Callable[[Tensor], Tensor],
    ) -> DrawnLater:
        """Draw from hidden [sources, hidden_size] what `sampler.greedy` or `sampler.sample` draws.

        Args:
            hidden: last hidden states.
            greedy: a model's own arg-max.
            make_logits: from hidden states to logits, which may be modified.
        """
        if not self.options:
            token_ids, best = greedy(hidden)
            if self.shared is not None:
                token_ids, best = token_ids[self.shared], best[self.shared]
            return DrawnLater(token_ids.masked_fill(~best.isfinite(), 0), best, None)
        logits, source_rows, given = make_logits(hidden), self.shared, None
        if self.changes:
            if source_rows is not None:  # rows of one source may be changed in different ways
                logits, source_rows = logits[source_rows], None
            given = logits.amax(dim=-1)
            for change in self.changes:
                change.apply(logits)
        token_ids, best = sample_tokens(logits, source_rows=source_rows, **self.options)
        return DrawnLater(token_ids.masked_fill(~best.isfinite(), 0), best, given)


def arrays_of(sampling: SamplingBatch | None, shared: NDArray[np.int64] | None) -> list[NDArray[Any]]:
    """Return what a draw needs on the device, in the order of `draw_of`."""
    arrays: list[NDArray[Any]] = [] if shared is None else [shared]
    return arrays if sampling is None else arrays + [getattr(sampling, name) for name in _ARRAYS]


def draw_of(sampling: SamplingBatch | None, shared: NDArray[np.int64] | None, tensors: Iterator[Tensor]) -> DeviceDraw:
    """Make a draw, given the tensors on the device of its `arrays_of`, which are taken from the front."""
    sources = None if shared is None else next(tensors)
    if sampling is None:
        return DeviceDraw(sources, {}, ())
    assert sampling.logprobs is None, "log-probabilities are looked at on the host"
    assert sampling.trial is None, "tokens are tried on grammars on the host"
    return DeviceDraw(sources, {name: next(tensors) for name in _ARRAYS}, sampling.changes)
