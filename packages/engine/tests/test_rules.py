"""What changes logits before the draw: each kind against Transformers, plain Python or NumPy; alone and in company."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.engine import Engine
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.runner.rules import filters
from octavo_engine.runner.rules.mirostat import num_kept
from octavo_engine.runner.sampler import Drawn, sample
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import Driver, make_runner, random_model, tiny_config
from octavo_engine.types import FinishReason, Request, SamplingParams, TokenSpan
from octavo_kvcache import CacheManager

VOCAB_SIZE = 40
CPU = torch.device("cpu")
NEGATIVE_INFINITY = float("-inf")


def new_row(row: int, sampling: SamplingParams, token_ids: tuple[int, ...] = (1, 2, 3), **changes: Any) -> NewRow:
    values: dict[str, Any] = {
        "row": row,
        "token_ids": token_ids,
        "num_prompt_tokens": len(token_ids),
        "sampling": sampling,
        "seed": row,
        "sequence_index": 0,
        "stop_token_ids": frozenset(),
        "block_ids": ((),),
        "num_computed_tokens": 0,
        "num_scheduled_tokens": len(token_ids),
        "samples": True,
    }
    return NewRow(**{**values, **changes})


class Sampler:
    """The sampling state of some rows, which are numbered 0, 1, ..."""

    def __init__(self, *rows: NewRow, vocab_size: int = VOCAB_SIZE) -> None:
        self.lengths = np.array([len(row.token_ids) for row in rows])
        self.known = np.zeros((len(rows), 400), np.int32)
        self.state = SamplingRows(self.known, vocab_size, CPU)
        for row in rows:
            self.known[row.row, : len(row.token_ids)] = row.token_ids
            self.state.add(row)

    @property
    def rows(self) -> NDArray[np.int64]:
        return np.arange(len(self.lengths))

    def append(self, *token_ids: int) -> None:
        self.known[self.rows, self.lengths] = token_ids
        self.lengths += 1
        self.state.append(self.rows, np.array(token_ids, np.int64))

    def changed(self, logits: Tensor) -> Tensor:
        """Return what becomes of logits [rows, vocab_size]."""
        batch = self.state.batch(self.rows, self.lengths)
        assert batch is not None
        logits = logits.clone()
        for change in batch.changes:
            change.apply(logits)
        return logits

    def draw(self, logits: Tensor) -> Drawn:
        batch = self.state.batch(self.rows, self.lengths)
        assert batch is not None
        return sample(logits.clone(), batch)


def changed(logits: Tensor, sampling: SamplingParams, token_ids: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    return Sampler(new_row(0, sampling, token_ids), vocab_size=logits.shape[1]).changed(logits)


def random_logits(num_rows: int = 1, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


# -- bans and biases ---------------------------------------------------------------------------------------------


def test_bad_words_equal_transformers_in_random_contexts() -> None:
    transformers = pytest.importorskip("transformers")
    source = random.Random(1)
    num_banned = 0
    for _ in range(100):
        words = [[source.randrange(4) for _ in range(source.randint(1, 4))] for _ in range(6)]
        token_ids = tuple(source.randrange(4) for _ in range(source.randint(1, 6)))
        logits = random_logits(vocab_size=5)
        reference = transformers.NoBadWordsLogitsProcessor(bad_words_ids=words, eos_token_id=4)
        expected = reference(torch.tensor([token_ids]), logits.clone())
        ours = changed(logits, SamplingParams(temperature=0, bad_words_ids=words), token_ids)
        assert ours.tolist() == expected.tolist(), (words, token_ids)
        num_banned += int(torch.isinf(ours).sum())
    assert num_banned > 100


def test_bad_words_follow_the_tokens_that_are_drawn() -> None:
    sampler = Sampler(new_row(0, SamplingParams(temperature=0, bad_words_ids=[[7, 8, 9]]), (7,)))
    logits = random_logits()
    assert not torch.isinf(sampler.changed(logits)).any()
    sampler.append(8)
    assert torch.isinf(sampler.changed(logits)).nonzero().tolist() == [[0, 9]]
    sampler.append(3)
    assert not torch.isinf(sampler.changed(logits)).any()


def test_logit_bias_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    bias = {3: -100.0, 5: 2.5, 39: 7.0}
    logits = random_logits()
    reference = transformers.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = reference(torch.tensor([[1, 2, 3]]), logits.clone())
    assert changed(logits, SamplingParams(temperature=0, logit_bias=bias)).tolist() == expected.tolist()


def test_only_allowed_tokens_are_left() -> None:
    logits = random_logits()
    left = changed(logits, SamplingParams(temperature=0, allowed_token_ids=[4, 20, 4]))
    assert left.isfinite().nonzero().tolist() == [[0, 4], [0, 20]]
    assert left[0, [4, 20]].tolist() == logits[0, [4, 20]].tolist()


def test_a_row_without_a_token_left_ends_alone() -> None:
    nothing = SamplingParams(temperature=0, allowed_token_ids=[4], logits_processors=[lambda _, row: row - math.inf])
    for other in (SamplingParams(temperature=0), SamplingParams(temperature=1.0, typical_p=0.5)):
        drawn = Sampler(new_row(0, other), new_row(1, nothing), new_row(2, other)).draw(random_logits(3))
        assert drawn.sound.tolist() == [True, False, True]
        assert "leave no token" in drawn.errors[1]
        assert list(drawn.errors) == [1]


# -- DRY ---------------------------------------------------------------------------------------------------------


def dry_penalties(token_ids: list[int], sampling: SamplingParams) -> dict[int, float]:
    """Go back from every earlier occurrence of the last token, token by token, as text-generation-webui does."""
    breakers, last = set(sampling.dry_breaker_ids), len(token_ids) - 1
    longest: dict[int, int] = {}
    if token_ids[last] in breakers:
        return {}
    for place in range(last):
        length = 0
        while place - length >= 0 and token_ids[place - length] == token_ids[last - length]:
            if token_ids[last - length] in breakers:
                break
            length += 1
        if length >= sampling.dry_allowed_length:
            following = token_ids[place + 1]
            longest[following] = max(longest.get(following, 0), length)
    return {
        token: sampling.dry_multiplier * sampling.dry_base ** (length - sampling.dry_allowed_length)
        for token, length in longest.items()
    }


@pytest.mark.parametrize("grown", [False, True], ids=["at once", "token by token"])
def test_dry_equals_a_plain_search_for_repetitions(grown: bool) -> None:
    source = random.Random(2)
    num_penalties = 0
    for case in range(150):
        sampling = SamplingParams(
            temperature=0,
            dry_multiplier=0.8,
            dry_base=source.choice([1.0, 1.75, 3.0]),
            dry_allowed_length=source.randint(1, 4),
            dry_breaker_ids=[3] if case % 2 else [],
        )
        token_ids = [source.randrange(4) for _ in range(source.randint(2, 120))]
        start = 1 if grown else len(token_ids)
        sampler = Sampler(new_row(0, sampling, tuple(token_ids[:start])))
        for token_id in token_ids[start:]:
            sampler.append(token_id)
        logits = random_logits(seed=case)
        lost = (logits - sampler.changed(logits))[0]
        expected = dry_penalties(token_ids, sampling)
        num_penalties += len(expected)
        ours = {token: value for token, value in enumerate(lost.tolist()) if value}
        assert ours == pytest.approx(expected, rel=1e-4), token_ids
    assert num_penalties > 100


def test_dry_penalty_of_a_long_repetition_stays_finite() -> None:
    sampling = SamplingParams(temperature=0, dry_multiplier=100, dry_base=100)
    lost = changed(random_logits(), sampling, (5,) * 300)
    assert lost.isfinite().all()
    assert lost[0, 5] < -1e30


# -- filters -----------------------------------------------------------------------------------------------------


def kept_by(warper: Callable[[Tensor, Tensor], Tensor], scores: Tensor) -> list[int]:
    left = warper(torch.tensor([[1]]), scores[None].float().clone())[0]
    return left.isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("seed", range(8))
def test_each_filter_equals_transformers_warper(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    flatness = 1 if seed < 6 else 20  # flat ones need more tokens than are selected at first
    scores = random_logits(1, 200 if seed < 4 else 3000, seed)[0] / flatness
    scores -= scores.max()
    for ours, warper in (
        (filters.typical_p(scores.numpy(), 0.3), transformers.TypicalLogitsWarper(0.3)),
        (filters.typical_p(scores.numpy(), 0.95), transformers.TypicalLogitsWarper(0.95)),
        (filters.top_p(scores.numpy(), 0.9), transformers.TopPLogitsWarper(0.9)),
        (filters.top_p(scores.numpy(), 0.01), transformers.TopPLogitsWarper(0.01)),
        (filters.top_k(scores.numpy(), 17), transformers.TopKLogitsWarper(17)),
        (filters.top_k(scores.numpy(), 1000), transformers.TopKLogitsWarper(1000)),
        (filters.min_p(scores.numpy(), 0.05), transformers.MinPLogitsWarper(0.05)),
    ):
        assert ours.tolist() == kept_by(warper, scores), warper


@pytest.mark.parametrize("seed", range(5))
def test_filters_are_applied_in_the_documented_order(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(1, 200, seed)
    sampling = SamplingParams(temperature=1.7, min_p=0.01, top_k=60, typical_p=0.9, top_p=0.85)
    expected = logits.clone()
    for warper in (
        transformers.TemperatureLogitsWarper(1.7),
        transformers.MinPLogitsWarper(0.01),
        transformers.TopKLogitsWarper(60),
        transformers.TypicalLogitsWarper(0.9),
        transformers.TopPLogitsWarper(0.85),
    ):
        expected = warper(torch.tensor([[1]]), expected)
    left = changed(logits, sampling).isfinite()
    assert left.tolist() == expected.isfinite().tolist()
    assert 1 < int(left.sum()) < 60


def test_xtc_removes_the_likely_tokens_but_the_least_of_them() -> None:
    scores = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05], np.float32) / 0.4)
    assert filters.removed_by_xtc(scores, 0.15).tolist() == [0, 2]
    assert filters.removed_by_xtc(scores, 0.25).tolist() == [0]
    assert filters.removed_by_xtc(scores, 0.35).tolist() == []  # one likely token alone stays
    assert filters.removed_by_xtc(scores, 0.5).tolist() == []


@pytest.mark.parametrize("flatness", [1, 5, 50, 1000])
def test_a_cut_finds_what_sorting_all_finds(flatness: int) -> None:
    scores = random_logits(1, 20_000, seed=flatness)[0].numpy() / flatness
    scores -= scores.max()
    in_order = np.sort(-scores)
    for count in (1, 100, 5000, 19_999):
        assert filters.smallest(-scores, count).tolist() == in_order[:count].tolist()
        assert filters.top_k(scores, count).tolist() == np.flatnonzero(-scores <= in_order[count - 1]).tolist()
    p = np.exp(scores.astype(np.float64))
    held = np.sort(p / p.sum())[::-1].cumsum()
    for mass in (0.05, 0.5, 0.9, 0.999):
        assert abs(len(filters.top_p(scores, mass)) - (int((held < mass).sum()) + 1)) <= 1


def test_barred_tokens_stay_barred_in_every_filter() -> None:
    logits = random_logits(1, 300)
    logits[0, ::2] = NEGATIVE_INFINITY
    for sampling in (
        SamplingParams(min_p=0.01, xtc_probability=1.0),
        SamplingParams(top_k=280, typical_p=0.999999),
        SamplingParams(typical_p=0.9, top_p=0.9),
        SamplingParams(mirostat_mode=1, mirostat_tau=50.0),
        SamplingParams(mirostat_mode=2, mirostat_tau=50.0),
    ):
        left = changed(logits, sampling).isfinite()[0]
        assert not left[::2].any()
        assert left.any()


# -- mirostat ----------------------------------------------------------------------------------------------------


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def num_kept_v1(p: NDArray[np.float64], limit: float) -> int:
    """The paper's algorithm 1, as llama.cpp writes it: estimate Zipf's exponent, then k."""
    sum_tb = sum_tt = 0.0
    for i in range(min(100, len(p)) - 1):
        t = math.log((i + 2) / (i + 1))
        sum_tb += t * math.log(p[i] / p[i + 1])
        sum_tt += t * t
    s = sum_tb / sum_tt
    epsilon = s - 1
    k = ((epsilon * 2**limit) / (1 - len(p) ** -epsilon)) ** (1 / s)
    return min(max(int(k), 1), len(p))


def test_mirostat_1_keeps_as_many_as_the_paper_says() -> None:
    for seed in range(20):
        scores = random_logits(1, 300, seed)[0].numpy()
        scores -= scores.max()
        p = np.sort(softmax(scores.astype(np.float64)))[::-1]
        for limit in (1.0, 4.0, 9.0):
            assert num_kept(scores, limit) == num_kept_v1(p, limit)
    assert num_kept(np.zeros(50, np.float32), 3.0) == 50
    assert num_kept(scores, 5000.0) == 300


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_learns_from_each_draw(mode: int) -> None:
    sampling = SamplingParams(temperature=0.8, mirostat_mode=mode, mirostat_tau=2.5, mirostat_eta=0.3)
    sampler = Sampler(new_row(0, sampling, seed=5))
    limit = 5.0
    for step in range(25):
        logits = random_logits(seed=step)
        scores = logits[0].double().numpy() / 0.8
        order = np.argsort(-scores)
        p = softmax(scores)[order]
        num_left = max(int((-np.log2(p) <= limit).sum()), 1) if mode == 2 else num_kept_v1(p, limit)
        left = sampler.changed(logits).isfinite()[0]
        assert set(left.nonzero()[:, 0].tolist()) == set(order[:num_left].tolist())
        (token_id,) = sampler.draw(logits).token_ids.tolist()
        sampler.append(token_id)
        surprise = -math.log2(softmax(scores[order[:num_left]])[order[:num_left].tolist().index(token_id)])
        limit -= 0.3 * (surprise - 2.5)
        assert sampler.state.states(sampler.rows) == {0: pytest.approx(limit, rel=1e-9)}


# -- functions of a request's own --------------------------------------------------------------------------------


def test_processors_see_the_tokens_so_far_and_change_their_row_alone() -> None:
    seen: list[list[int]] = []

    def only_token_9(token_ids: list[int], logits: Tensor) -> Tensor:
        seen.append(token_ids)
        return torch.where(torch.arange(len(logits)) == 9, logits, NEGATIVE_INFINITY)

    def in_place(token_ids: list[int], logits: Tensor) -> None:
        logits[9] -= len(token_ids)

    plain = SamplingParams(temperature=0)
    own = SamplingParams(temperature=0, logits_processors=[only_token_9, in_place])
    sampler = Sampler(new_row(0, plain), new_row(1, own, (5, 6)), new_row(2, plain))
    logits = random_logits(3)
    drawn = sampler.draw(logits)
    best = logits.argmax(-1).tolist()
    assert drawn.token_ids.tolist() == [best[0], 9, best[2]]
    sampler.append(*drawn.token_ids.tolist())
    after = sampler.changed(logits)
    assert seen == [[5, 6], [5, 6, 9]]
    assert float(after[1, 9]) == pytest.approx(float(logits[1, 9]) - 3)


def raises(token_ids: list[int], logits: Tensor) -> Tensor:
    raise KeyError("my own mistake")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raises, "KeyError: 'my own mistake'"),
        (lambda _, logits: logits[1:], r"expected a tensor of shape \(40,\) or None, it returned \(39,\)"),
        (lambda _, logits: 3.5, "it returned float"),
        (lambda _, logits: logits * math.nan, "it returned NaN"),
        (lambda _, logits: logits + math.inf, "or infinity"),
    ],
    ids=["raises", "shape", "type", "nan", "inf"],
)
def test_what_a_processor_raises_ends_its_row_alone(processor: Any, message: str) -> None:
    good = SamplingParams(temperature=0, logits_processors=[lambda _, logits: None])
    bad = SamplingParams(temperature=0.5, logits_processors=[processor], logprobs=1)
    logits = random_logits(3)
    drawn = Sampler(new_row(0, good), new_row(1, bad), new_row(2, good)).draw(logits)
    assert drawn.sound.tolist() == [True, False, True]
    assert drawn.token_ids[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(drawn.errors[1])


# -- company and preemption --------------------------------------------------------------------------------------

EVERY_KIND = {
    "plain": SamplingParams(temperature=1.0),
    "greedy": SamplingParams(temperature=0),
    "native filters": SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01),
    "typical": SamplingParams(temperature=1.2, typical_p=0.7, top_k=30),
    "xtc": SamplingParams(temperature=1.5, xtc_probability=0.5, xtc_threshold=0.05),
    "mirostat 1": SamplingParams(temperature=1.3, mirostat_mode=1, mirostat_tau=3.0),
    "mirostat 2": SamplingParams(temperature=1.3, mirostat_mode=2, mirostat_tau=3.0, mirostat_eta=0.4),
    "penalties": SamplingParams(temperature=1.0, frequency_penalty=0.7, repetition_penalty=1.3),
    "dry": SamplingParams(temperature=0.7, dry_multiplier=1.0, dry_allowed_length=1, dry_breaker_ids=[4]),
    "bias": SamplingParams(temperature=1.0, logit_bias=dict.fromkeys(range(5), 6.0)),
    "allowed": SamplingParams(temperature=1.5, allowed_token_ids=list(range(20, 40))),
    "bad words": SamplingParams(
        temperature=1.5, allowed_token_ids=[1, 2, 3], bad_words_ids=[[1, 2], [2, 3], [3, 3, 3]]
    ),
    "processor": SamplingParams(temperature=1.0, logits_processors=[lambda ids, row: row.roll(len(ids))]),
    "min_tokens": SamplingParams(temperature=1.0, min_tokens=10),
}


def prompt(seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(97) for _ in range(3 + seed % 9)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """What each kind draws when it runs by itself."""
    model = random_model(tiny_config())
    answers = {}
    for place, (name, sampling) in enumerate(EVERY_KIND.items()):
        driver = Driver(make_runner(model))
        driver.add(0, prompt(place), sampling, seed=50 + place, stop_token_ids=[2])
        answers[name] = driver.generate(14)[0]
    return answers


def test_every_kind_draws_in_company_what_it_draws_alone(alone: dict[str, list[int]]) -> None:
    driver = Driver(make_runner(random_model(tiny_config()), num_blocks=128, max_num_seqs=len(EVERY_KIND)), seed=3)
    for place, sampling in enumerate(EVERY_KIND.values()):
        driver.add(place, prompt(place), sampling, seed=50 + place, stop_token_ids=[2])
    together = driver.generate(14)
    assert {name: together[place] for place, name in enumerate(EVERY_KIND)} == alone


def test_every_kind_goes_on_after_preemption(alone: dict[str, list[int]]) -> None:
    num_seqs = len(EVERY_KIND)
    runner = make_runner(random_model(tiny_config()), num_blocks=128, max_num_seqs=num_seqs)
    scheduler = Scheduler(CacheManager(128, 4), max_num_seqs=num_seqs, max_num_batched_tokens=100, max_model_len=64)
    engine = Engine(scheduler, InlineExecutor(runner))
    for place, (name, sampling) in enumerate(EVERY_KIND.items()):
        own = replace(sampling, seed=50 + place, max_tokens=14, stop_token_ids=[2])
        engine.add(Request(request_id=name, inputs=(TokenSpan(tuple(prompt(place))),), sampling=own))
    answers: dict[str, list[int]] = {name: [] for name in EVERY_KIND}
    for step in itertools.count():
        if not engine.has_work:
            break
        if step % 4 == 3:
            for sequence in list(scheduler._residents.running):
                scheduler._residents.preempt(sequence)
        for update in engine.step():
            assert update.finish_reason is not FinishReason.ERROR, update.error
            answers[update.request_id] += update.token_ids
    assert scheduler.counters.num_preemptions > 2 * num_seqs
    for name, token_ids in answers.items():
        expected = alone[name]
        first_stop = expected.index(2, 9 if name == "min_tokens" else 0) if 2 in expected else len(expected)
        assert token_ids == expected[: first_stop + 1], name
