"""LogitRules: the rules in the order in which they change logits, and which rows use which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from octavo_engine.batch import NewRow, RowMove
from octavo_engine.runner.rules.allowed_tokens import AllowedTokensRule
from octavo_engine.runner.rules.bad_words import BadWordsRule
from octavo_engine.runner.rules.base import LogitChange, LogitRule
from octavo_engine.runner.rules.distribution import DistributionRule
from octavo_engine.runner.rules.dry import DryRule
from octavo_engine.runner.rules.grammar import GrammarRule
from octavo_engine.runner.rules.logit_bias import LogitBiasRule
from octavo_engine.runner.rules.min_tokens import MinTokensRule
from octavo_engine.runner.rules.mirostat import MirostatRule
from octavo_engine.runner.rules.penalties import PenaltyRule
from octavo_engine.runner.rules.processors import ProcessorsRule

_FIXED = (AllowedTokensRule, LogitBiasRule, MinTokensRule)
"""What these do to logits depends on the position at most, never on a token, and takes no look at the logits."""


def make_rules(
    token_ids: NDArray[np.int32],
    vocab_size: int,
    device: torch.device,
    mirostat: MirostatRule,
    grammar: GrammarRule,
) -> LogitRules:
    """Return every rule there is, in order.

    The order is vLLM's: what is forbidden, then what is added, then penalties. A request's own functions see the
    result, and the filters theirs. Grammars come after the functions, which therefore cannot leave them.

    Args:
        token_ids: [max_num_rows, max_num_tokens + 1] int32, the known tokens of every row; not modified.
        vocab_size: columns of the logits.
        device: where the logits are.
        mirostat: the rule whose state outlives its rows.
        grammar: the rule that also knows what must come next.
    """
    max_num_rows = len(token_ids)
    return LogitRules(
        max_num_rows,
        (
            AllowedTokensRule(vocab_size, device),
            BadWordsRule(token_ids),
            MinTokensRule(max_num_rows),
            LogitBiasRule(),
            PenaltyRule(max_num_rows, vocab_size, device),
            DryRule(),
            ProcessorsRule(token_ids),
            grammar,
            DistributionRule(device),
            mirostat,
        ),
    )


class LogitRules:
    """Hands rows to the rules that they use; a batch whose rows use none pays nothing.

    Args:
        max_num_rows: rows there can be.
        rules: in the order in which they change logits.
    """

    def __init__(self, max_num_rows: int, rules: Sequence[LogitRule]) -> None:
        self._rules = rules
        self._uses = np.zeros((len(rules), max_num_rows), np.bool_)
        self._used: list[tuple[LogitRule, NDArray[np.bool_]]] = []  # with the rows that use each

    def add(self, new: NewRow) -> bool:
        """Fill a row, whatever it held before; True if it uses any rule."""
        return self._set([rule.add(new) for rule in self._rules], new.row)

    def release(self, rows: Iterable[int]) -> None:
        """Forget rows whose sequences have left."""
        for row in rows:
            self._set([False] * len(self._rules), row)

    def of(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[LogitChange, ...]:
        """Collect the changes to the next draw of some rows, in order; empty if there are none.

        Args:
            rows: [num_rows], in the order of the logits.
            positions: [num_rows], of the tokens that are drawn.
        """
        changes = []
        for rule, uses in self._used:
            places = np.flatnonzero(uses[rows])
            if len(places):
                change = rule.of(places, rows[places], positions[places])
                if change is not None:
                    changes.append(change)
        return tuple(changes)

    def follow_tokens(self, rows: NDArray[np.int64]) -> bool:
        """Return whether any of some rows uses a rule that must know its last token, or works on the host."""
        return any(uses[rows].any() for rule, uses in self._used if not isinstance(rule, _FIXED))

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Take in one token for each of some different rows."""
        for rule, uses in self._used:
            using = uses[rows]
            if using.any():
                rule.append(rows[using], token_ids[using])

    def move(self, moves: Sequence[RowMove]) -> None:
        """Let rows go on from others, as these were before, and let each take in its token."""
        for move in moves:
            if move.source is not None:
                self._copy(move.row, move.source)
        self.append(np.array([move.row for move in moves]), np.array([move.token_id for move in moves]))

    def _copy(self, row: int, source: int) -> None:
        uses = self._uses[:, source].tolist()
        for rule, used in zip(self._rules, uses, strict=True):
            if used:
                rule.copy(row, source)
        self._set(uses, row)

    def _set(self, uses: list[bool], row: int) -> bool:
        any_use = any(uses)
        if any_use or self._uses[:, row].any():
            self._uses[:, row] = uses
            self._used = [(rule, used) for rule, used in zip(self._rules, self._uses, strict=True) if used.any()]
        return any_use
