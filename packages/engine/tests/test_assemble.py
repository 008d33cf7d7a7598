"""Assembler: cumulative and final outputs, and the best of several sequences."""

from __future__ import annotations

from typing import Any

import pytest

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.text.assemble import Assembler, best_first, make_assembler
from octavo_engine.types import CompletionDelta, FinishReason, TokenLogprobs


def delta(index: int, text: str, *token_ids: int, ends: bool = False, **changes: Any) -> CompletionDelta:
    logprobs = tuple(TokenLogprobs(token_id, -token_id / 10, 1) for token_id in token_ids)
    reason = FinishReason.STOP if ends else None
    return CompletionDelta(index, text, token_ids, len(token_ids), logprobs, reason, **changes)


def shown(deltas: list[CompletionDelta]) -> list[tuple[int, str, tuple[int, ...], bool]]:
    return [(d.index, d.text, d.token_ids, d.finish_reason is not None) for d in deltas]


def test_deltas_need_no_assembler() -> None:
    assert make_assembler(SamplingParams(n=2, best_of=2)) is None
    assert make_assembler(SamplingParams(best_of=2)) is not None
    assert make_assembler(SamplingParams(output_kind="final")) is not None


def test_cumulative_output_repeats_what_came_before() -> None:
    assembler = Assembler(SamplingParams(n=2, output_kind="cumulative", logprobs=0))
    assert shown(assembler.take([delta(0, "a", 1), delta(1, "x", 7)])) == [(0, "a", (1,), False), (1, "x", (7,), False)]
    (second,) = assembler.take([delta(0, "bc", 2, 3, ends=True)])
    assert shown([second]) == [(0, "abc", (1, 2, 3), True)]
    assert second.logprobs is not None
    assert [entry.token_id for entry in second.logprobs] == [1, 2, 3]


def test_final_output_comes_once_for_each_choice() -> None:
    assembler = Assembler(SamplingParams(n=2, output_kind="final"))
    assert assembler.take([delta(0, "a", 1, prompt_logprobs=()), delta(1, "x", 7)]) == []
    (last,) = assembler.take([delta(1, "y", 8), delta(0, "b", 2, ends=True)])
    assert shown([last]) == [(0, "ab", (1, 2), True)]
    assert last.prompt_logprobs == ()
    assert last.logprobs is None
    assert shown(assembler.take([delta(1, "", 9, ends=True)])) == [(1, "xy", (7, 8, 9), True)]


def test_best_sequences_are_shown_in_order_when_all_have_ended() -> None:
    entries = (TokenLogprobs(4, -1.0, 1),)
    assembler = Assembler(SamplingParams(n=2, best_of=3))
    assert assembler.take([delta(0, "worst", 9, ends=True, prompt_logprobs=entries), delta(1, "go", 2)]) == []
    assert assembler.take([delta(1, "od", 3, ends=True)]) == []
    best = assembler.take([delta(2, "best", 4, ends=True)])
    assert shown(best) == [(0, "best", (4,), True), (1, "good", (2, 3), True)]
    assert [d.prompt_logprobs for d in best] == [entries, None]
    assert [d.logprobs for d in best] == [None, None]


@pytest.mark.parametrize(("sums", "expected"), [([-3, -1, -2], [1, 2]), ([-1, -1, -1], [0, 1]), ([-1], [0])])
def test_best_first(sums: list[float], expected: list[int]) -> None:
    assert best_first(sums, 2) == expected
