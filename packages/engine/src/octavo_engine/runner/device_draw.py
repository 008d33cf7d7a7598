"""DeviceDraw: how the tokens of a step are drawn where nobody may wait for the host to see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from octavo_engine.runner.rules.base import LogitChange
from octavo_kernels import sample_tokens


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
