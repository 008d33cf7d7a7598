"""The sampler: greedy draws, rows that stand alone, penalties, bans, and log-probabilities; test_draws has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.penalties import Penalties
from octavo_engine.runner.sampler import Drawn, greedy, sample
from octavo_engine.runner.sampler import draw as draw_plain
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.types import SamplingParams
from octavo_kernels import sample_tokens

VOCAB_SIZE = 50
CPU = torch.device("cpu")


def new_row(
    row: int,
    sampling: SamplingParams,
    token_ids: tuple[int, ...] = (1, 2, 3),
    num_prompt_tokens: int | None = None,
    **changes: Any,
) -> NewRow:
    values: dict[str, Any] = {
        "row": row,
        "token_ids": token_ids,
        "num_prompt_tokens": len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        "sampling": sampling,
        "seed": 0,
        "sequence_index": 0,
        "stop_token_ids": frozenset(),
        "block_ids": ((),),
        "num_computed_tokens": 0,
        "num_scheduled_tokens": len(token_ids),
        "samples": True,
    }
    return NewRow(**{**values, **changes})


def sampling_rows(*rows: NewRow, vocab_size: int = VOCAB_SIZE) -> SamplingRows:
    known = np.zeros((len(rows), 64), np.int32)
    state = SamplingRows(known, vocab_size, CPU)
    for row in rows:
        known[row.row, : len(row.token_ids)] = row.token_ids
        state.add(row)
    return state


def draw(logits: Tensor, *rows: NewRow) -> Drawn:
    """Draw once for each of some rows, whose row numbers are 0, 1, ..."""
    state = sampling_rows(*rows, vocab_size=logits.shape[1])
    positions = np.array([len(row.token_ids) for row in rows], np.int64)
    batch = state.batch(np.arange(len(rows)), positions)
    return greedy(logits.argmax(-1), logits.amax(-1)) if batch is None else sample(logits.clone(), batch)


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


# -- greedy ------------------------------------------------------------------------------------------------------


def test_greedy_rows_take_the_arg_max_beside_random_rows() -> None:
    logits = random_logits(4)
    hot = SamplingParams(temperature=2.0)
    cold = SamplingParams(temperature=0)
    rows = [new_row(i, hot if i % 2 else cold, seed=i) for i in range(4)]
    assert draw(logits, *rows).token_ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


def test_greedy_tie_takes_the_lowest_token_id() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 30]] = 1.0
    assert draw(logits, new_row(0, SamplingParams(temperature=0))).token_ids.tolist() == [7]


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 5e-324])
def test_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = random_logits(1)
    drawn = draw(logits, new_row(0, SamplingParams(temperature=temperature)))
    assert drawn.token_ids.tolist() == logits.argmax(-1).tolist()


# -- rows stand alone --------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_token_whatever_the_batch() -> None:
    logits = random_logits(40, 500)
    sampling = [
        SamplingParams(temperature=0.5 + i / 40, top_k=(i % 3) * 20, top_p=1 - (i % 4) / 10, logprobs=i % 5)
        for i in range(40)
    ]
    rows = [new_row(i, sampling[i], seed=1000 + i) for i in range(40)]
    together = draw(logits, *rows)
    for i in range(40):
        alone = draw(logits[i : i + 1], new_row(0, sampling[i], seed=1000 + i))
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs is not None
        assert together.logprobs is not None
        assert alone.logprobs[0] == together.logprobs[i]


@pytest.mark.parametrize(
    "changes",
    [{}, {"logprobs": 2}, {"presence_penalty": 1.5}, {"min_tokens": 3, "logprobs": 1}],
    ids=["plain", "logprobs", "penalties", "bans"],
)
def test_rows_that_share_logits_draw_as_from_copies(changes: dict[str, Any]) -> None:
    logits = random_logits(3)
    shared = np.array([2, 0, 0, 1, 0])
    sampling = SamplingParams(temperature=0.9, top_p=0.95, **changes)
    rows = [
        new_row(i, sampling, (1, 2, 3, 20 + i), num_prompt_tokens=3, seed=i, stop_token_ids=frozenset({i, 40}))
        for i in range(5)
    ]
    batch = sampling_rows(*rows).batch(np.arange(5), np.full(5, 4))
    assert batch is not None
    drawn, copied = sample(logits.clone(), batch, shared), sample(logits[torch.from_numpy(shared)], batch)
    assert drawn.token_ids.tolist() == copied.token_ids.tolist()
    assert drawn.logprobs == copied.logprobs


def test_seed_sequence_index_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 100_000)
    hot = SamplingParams(temperature=1.0)
    first = draw(logits, new_row(0, hot)).token_ids[0]
    others = [
        new_row(0, hot, seed=1),
        new_row(0, hot, seed=-1),
        new_row(0, hot, sequence_index=1),
        new_row(0, hot, token_ids=(1, 2, 3, 4)),
    ]
    drawn = {int(draw(logits, row).token_ids[0]) for row in others} | {int(first)}
    assert len(drawn) == 5
    assert draw(logits, new_row(0, hot, token_ids=(9, 9, 9))).token_ids[0] == first


def test_unsound_row_is_marked_and_the_others_are_drawn() -> None:
    logits = random_logits(4)
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    for sampling in (SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_p=0.5)):
        drawn = draw(logits, *[new_row(i, sampling, seed=i) for i in range(4)])
        assert drawn.sound.tolist() == [True, False, False, True]
        sound = draw(random_logits(4), *[new_row(i, sampling, seed=i) for i in range(4)])
        assert drawn.token_ids[[0, 3]].tolist() == sound.token_ids[[0, 3]].tolist()


# -- penalties and bans ------------------------------------------------------------------------------------------


def penalised_logits(logits: Tensor, row: NewRow) -> Tensor:
    state = sampling_rows(row)
    changed = logits.clone()
    penalties_of(state, len(row.token_ids)).apply(changed)
    return changed


def penalties_of(state: SamplingRows, position: int) -> Penalties:
    batch = state.batch(np.array([0]), np.array([position]))
    assert batch is not None
    (change,) = batch.changes
    assert isinstance(change, Penalties)
    return change


def test_repetition_penalty_equals_transformers_on_prompt_and_output() -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(1)
    token_ids = (1, 5, 9, 9, 14)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([token_ids]), logits.clone())
    row = new_row(0, SamplingParams(temperature=0, repetition_penalty=1.7), token_ids, num_prompt_tokens=2)
    torch.testing.assert_close(penalised_logits(logits, row), expected)


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    sampling = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    row = new_row(0, sampling, (1, 5, 9, 9, 14), num_prompt_tokens=2)
    changed = penalised_logits(logits, row)[0]
    assert {i: v for i, v in enumerate(changed.tolist()) if v} == {9: -1.0, 14: -0.75}


def test_drawn_tokens_are_counted() -> None:
    row = new_row(0, SamplingParams(temperature=0, frequency_penalty=1.0))
    state = sampling_rows(row)
    for _ in range(3):
        state.append(np.array([0]), np.array([4]))
    penalties = penalties_of(state, 6)
    assert penalties.output_counts[0].nonzero().tolist() == [[4]]
    assert penalties.output_counts[0, 4] == 3


def test_row_that_is_taken_again_forgets_its_counts() -> None:
    sampling = SamplingParams(temperature=0, frequency_penalty=1.0, repetition_penalty=2.0)
    state = sampling_rows(new_row(0, sampling, (1, 2, 3), num_prompt_tokens=1))
    state.append(np.array([0]), np.array([4]))
    state.add(new_row(0, sampling, (7, 8), num_prompt_tokens=1))
    penalties = penalties_of(state, 2)
    assert penalties.output_counts[0].nonzero().tolist() == [[8]]
    assert penalties.prompt_seen[0].nonzero().tolist() == [[7]]


def test_penalties_leave_other_rows_alone() -> None:
    logits = random_logits(3)
    best = logits.argmax(-1).tolist()
    plain = SamplingParams(temperature=0)
    harsh = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0)
    rows = [
        new_row(0, plain),
        new_row(1, harsh, (1, best[1], best[1], best[1]), num_prompt_tokens=1),
        new_row(2, plain),
    ]
    drawn = draw(logits, *rows).token_ids.tolist()
    assert [drawn[0], drawn[2]] == [best[0], best[2]]
    assert drawn[1] != best[1]


def test_min_tokens_bans_stop_tokens_until_they_are_reached() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8], logits[0, 9] = 3.0, 2.0, 1.0
    sampling = SamplingParams(temperature=0, min_tokens=2)

    def drawn_after(num_output_tokens: int) -> int:
        token_ids = (1, 2, 3) + (4,) * num_output_tokens
        row = new_row(0, sampling, token_ids, num_prompt_tokens=3, stop_token_ids=frozenset({7, 8}))
        return int(draw(logits, row).token_ids[0])

    assert [drawn_after(n) for n in range(4)] == [9, 9, 7, 7]


def test_min_tokens_bans_nothing_in_other_rows() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 7] = 3.0
    logits[:, 8] = 2.0
    rows = [
        new_row(0, SamplingParams(temperature=0), stop_token_ids=frozenset({7})),
        new_row(1, SamplingParams(temperature=0, min_tokens=1), stop_token_ids=frozenset({7})),
        new_row(2, SamplingParams(temperature=0, min_tokens=1)),
    ]
    assert draw(logits, *rows).token_ids.tolist() == [7, 8, 7]


# -- log-probabilities -------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(3)
    raw = logits.log_softmax(-1)
    sampling = SamplingParams(temperature=1.9, top_p=0.99, presence_penalty=1.0, logprobs=4)
    rows = [
        new_row(0, SamplingParams(temperature=0)),
        new_row(1, sampling, seed=3),
        new_row(2, SamplingParams(temperature=0, logprobs=0)),
    ]
    drawn = draw(logits, *rows)
    assert drawn.logprobs is not None
    plain, full, bare = drawn.logprobs
    assert plain is None
    assert full is not None
    token_id = int(drawn.token_ids[1])
    assert full.token_id == token_id
    assert full.logprob == pytest.approx(raw[1, token_id].item(), abs=1e-6)
    order = raw[1].argsort(descending=True).tolist()
    assert full.rank == order.index(token_id) + 1
    assert [i for i, _ in full.top] == order[:4]
    assert [v for _, v in full.top] == pytest.approx(raw[1, order[:4]].tolist(), abs=1e-6)
    assert bare is not None
    assert bare.rank == 1
    assert bare.top == ()


PLAIN = SamplingParams(temperature=0.8)
NOT_PLAIN = {
    "top_k": SamplingParams(temperature=0.8, top_k=3),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "min_p": SamplingParams(temperature=0.8, min_p=0.1),
    "logprobs": SamplingParams(temperature=0.8, logprobs=0),
    "penalties": SamplingParams(temperature=0.8, presence_penalty=1.0),
}


def test_plain_rows_draw_what_they_draw_from_logits() -> None:
    logits, shared = random_logits(3), np.array([2, 0, 0, 1])
    rows = [new_row(i, PLAIN if i else SamplingParams(temperature=0), seed=i) for i in range(4)]
    batch = sampling_rows(*rows).batch(np.arange(4), np.full(4, 3))
    assert batch is not None
    assert batch.is_plain
    logits[0, 7] = torch.nan
    drawn = draw_plain(logits, sample_tokens, batch, shared)
    expected = sample(logits.clone(), batch, shared)
    assert drawn.sound.tolist() == expected.sound.tolist() == [True, False, False, True]
    assert drawn.token_ids[drawn.sound].tolist() == expected.token_ids[drawn.sound].tolist()


@pytest.mark.parametrize("sampling", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_one_row_that_wants_more_makes_a_batch_not_plain(sampling: SamplingParams) -> None:
    batch = sampling_rows(new_row(0, PLAIN), new_row(1, sampling)).batch(np.arange(2), np.full(2, 3))
    assert batch is not None
    assert not batch.is_plain


def test_plain_greedy_batch_collects_nothing() -> None:
    rows = [new_row(i, SamplingParams(temperature=0)) for i in range(3)]
    assert sampling_rows(*rows).batch(np.arange(3), np.full(3, 3)) is None
