"""GrammarRule: the grammars of the rows that have one, and which tokens they allow next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.errors import EngineBusy, InvalidRequest
from octavo_engine.runner.rules.base import RowsFailed
from octavo_engine.runner.rules.changes import on_device
from octavo_engine.runner.rules.distribution import filters_whole_rows
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.structured.compiler import GrammarCompiler, error_of
from octavo_kernels import apply_token_bitmask, num_native_threads

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_FEW = 16  # masks that one thread makes sooner than others wake up to help: most take some 10 microseconds


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that grammars allow some rows of a step's logits.

    Attributes:
        places: [num_rows] int64, rows of the logits.
        bitmask: [num_rows, num_words] int32, on the host.
        errors: why no mask could be made, by place.
    """

    places: NDArray[np.int64]
    bitmask: Tensor
    errors: Mapping[int, str]

    def remove(self, scores: Tensor) -> None:
        """Set the other tokens of scores [rows, vocab_size] to -inf; rows without a mask keep all."""
        apply_token_bitmask(scores, self.bitmask.to(scores.device), rows=on_device(self.places, scores))

    def apply(self, logits: Tensor) -> None:
        """Remove the other tokens from logits [draws, vocab_size]; raise RowsFailed for rows without a mask."""
        self.remove(logits)
        if self.errors:
            raise RowsFailed(self.errors)


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows whose tokens are drawn from all there are and tried on their grammars afterwards.

    A draw takes the largest of the scores with noise: if a grammar allows that token, it is the largest of those that
    the grammar allows too. So a mask, which takes far longer than a trial, is made for the other rows alone.

    Attributes:
        rule: knows the grammars.
        places: [num_rows] int64, where the rows stand among the draws.
        rows: [num_rows] int64.
    """

    rule: GrammarRule
    places: NDArray[np.int64]
    rows: NDArray[np.int64]

    def mask(self, token_ids: NDArray[np.int64]) -> TokenMask | None:
        """Return the mask of the places whose tokens must be drawn again under one; None if all are allowed.

        Args:
            token_ids: [num_draws], the token that was drawn in each place.
        """
        drawn = zip(self.rows.tolist(), token_ids[self.places].tolist(), strict=True)
        misses = [not self.rule.allows(row, token_id) for row, token_id in drawn]
        return self.rule.masks(self.places[misses], self.rows[misses]) if any(misses) else None


class GrammarRule:
    """A matcher for each row with a constraint; it follows the row's output.

    A row that enters with output, as it does after preemption, has its matcher follow that first. Rows whose draw does
    not depend on what else is allowed are tried, not masked.

    Args:
        max_num_rows: rows there can be.
        vocab_size: columns of the logits.
        grammars: makes matchers; None where no request may have a constraint.
    """

    def __init__(self, max_num_rows: int, vocab_size: int, grammars: GrammarCompiler | None) -> None:
        self._shape = (max_num_rows, -(-vocab_size // 32))
        self._grammars = grammars
        self._matchers: dict[int, LLMatcher] = {}
        self._refused: dict[int, str] = {}
        self._ahead: dict[int, list[int]] = {}  # the tokens that must come next, where that is known
        self._tried: set[int] = set()
        self._bitmask: Tensor | None = None
        self._executor: LLExecutor | None = None

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if its text is constrained."""
        params = new.sampling.structured_outputs
        self._forget(new.row)
        if params is None:
            return False
        if _may_draw_first(new.sampling) and not new.num_candidates:  # a search needs all that may come next
            self._tried.add(new.row)
        assert self._grammars is not None, "a request with a constraint reached a runner without grammars"
        try:
            matcher = self._grammars.matcher(params)
        except (InvalidRequest, EngineBusy) as error:  # it was compiled at submission: this request alone ends
            self._refused[new.row] = str(error)
            return True
        matcher.consume_tokens(list(new.token_ids[new.num_prompt_tokens :]))
        self._matchers[new.row] = matcher
        return True

    def of(
        self,
        places: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],  # noqa: ARG002
    ) -> TokenMask | None:
        """Compute the masks of those of some rows that are masked before the draw."""
        masked = [row not in self._tried for row in rows.tolist()]
        return self.masks(places[masked], rows[masked]) if any(masked) else None

    def trial(self, rows: NDArray[np.int64]) -> Trial | None:
        """Return the trial of those of some rows that are tried after the draw; None if none is."""
        places = np.array([place for place, row in enumerate(rows.tolist()) if row in self._tried], np.int64)
        return Trial(self, places, rows[places]) if len(places) else None

    def allows(self, row: int, token_id: int) -> bool:
        """Return whether it is sure without a mask that a row's mask has a token.

        It is not where the text that comes next is forced: a mask has one of its spellings alone.
        """
        matcher = self._matchers.get(row)
        return matcher is not None and not self.forced(row) and matcher.validate_tokens([token_id]) == 1

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Follow one drawn token in each of some different rows."""
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            if row not in self._matchers:
                continue
            fits = self._matchers[row].consume_token(token_id)  # one that does not shows at the next mask
            ahead = self._ahead.pop(row, None)
            if fits and ahead and ahead[0] == token_id and len(ahead) > 1:
                self._ahead[row] = ahead[1:]

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is; both follow their own tokens from here."""
        self._forget(row)
        if source in self._refused:
            self._refused[row] = self._refused[source]
        else:
            self._matchers[row] = self._matchers[source].deep_copy()

    def forced(self, row: int) -> list[int]:
        """Return the tokens that must come next in a row, as the model's tokenizer writes them; mostly none.

        Its mask has the first of them alone.
        """
        if row not in self._ahead:
            matcher = self._matchers.get(row)
            self._ahead[row] = [] if matcher is None else matcher.compute_ff_tokens()
        return self._ahead[row]

    def masks(self, places: NDArray[np.int64], rows: NDArray[np.int64]) -> TokenMask:
        """Compute the masks of some rows, many of them on several threads; they hold until the next ones."""
        bitmask, executor = self._scratch()
        errors: dict[int, str] = {}
        tasks: list[tuple[LLMatcher, int]] = []
        for index, row in enumerate(rows.tolist()):
            if row in self._matchers:
                tasks.append((self._matchers[row], index))
            else:
                errors[int(places[index])] = self._refused[row]
                bitmask[index] = -1
        num_bytes = bitmask.stride(0) * bitmask.itemsize
        if len(tasks) > _FEW:
            executor.unsafe_compute_mask_ptr(tasks, bitmask.data_ptr(), num_bytes, len(bitmask))
        else:
            for matcher, index in tasks:
                matcher.unsafe_compute_mask_ptr(bitmask[index].data_ptr(), num_bytes)
        for matcher, index in tasks:
            if matcher.is_error():
                errors[int(places[index])] = f"the grammar of this request failed: {error_of(matcher)}"
                bitmask[index] = -1
        return TokenMask(places, bitmask[: len(rows)], errors)

    def _forget(self, row: int) -> None:
        self._matchers.pop(row, None)
        self._refused.pop(row, None)
        self._ahead.pop(row, None)
        self._tried.discard(row)

    def _scratch(self) -> tuple[Tensor, LLExecutor]:
        if self._bitmask is None or self._executor is None:
            from llguidance import LLExecutor

            self._bitmask = torch.empty(self._shape, dtype=torch.int32)
            self._executor = LLExecutor(num_threads=num_native_threads())
        return self._bitmask, self._executor


def _may_draw_first(sampling: SamplingParams) -> bool:
    """Return whether the token that a row draws is the same, allowed, whether others are allowed or not."""
    filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0 or filters_whole_rows(sampling)
    shown = sampling.wants_logprobs and sampling.logprobs_mode == "processed"
    return not shown and not sampling.mirostat_mode and (sampling.greedy or not filtered)
