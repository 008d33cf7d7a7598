"""Log-probabilities: how many, of which tokens, of which distribution; those of prompts, however they are computed."""

from __future__ import annotations

import random

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.engine import Engine
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.models.llama import Llama
from octavo_engine.runner.logprobs import WantedLogprobs
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import Driver, make_runner, random_model, rows_of, tiny_config
from octavo_engine.types import Request, SamplingParams, TokenLogprobs, TokenSpan
from octavo_kvcache import CacheManager

VOCAB_SIZE = 97


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(vocab_size=VOCAB_SIZE))


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def logits_after(model: Llama, token_ids: list[int]) -> Tensor:
    """Return the logits [len(token_ids), vocab_size] of one pass over all tokens."""
    kept: list[Tensor] = []
    driver = Driver(make_runner(model, watch=lambda _, hidden: kept.append(hidden.clone())))
    driver.add(0, token_ids)
    driver.step({0: len(token_ids)})
    return model.logits(kept[0]).clone()


def first_entry(model: Llama, sampling: SamplingParams, token_ids: list[int]) -> TokenLogprobs:
    driver = Driver(make_runner(model))
    driver.add(1, prompt(4, seed=9))
    driver.add(3, token_ids, sampling, seed=4)
    batch, output = driver.run({1: 4, 3: len(token_ids)})
    assert output.logprobs is not None
    entries = output.logprobs[rows_of(batch).index(3)]
    assert entries is not None
    return entries[0]


def test_minus_one_reports_the_whole_vocabulary(model: Llama) -> None:
    expected = logits_after(model, prompt(6))[-1].log_softmax(-1)
    entry = first_entry(model, SamplingParams(temperature=1.0, logprobs=-1), prompt(6))
    assert sorted(token for token, _ in entry.top) == list(range(VOCAB_SIZE))
    assert [value for _, value in entry.top] == sorted((v for _, v in entry.top), reverse=True)
    for token, value in entry.top:
        assert value == pytest.approx(expected[token].item(), abs=1e-5)
    assert entry.top[entry.rank - 1][1] == entry.logprob


def test_given_tokens_are_reported_besides(model: Llama) -> None:
    expected = logits_after(model, prompt(6))[-1].log_softmax(-1)
    entry = first_entry(model, SamplingParams(temperature=0, logprob_token_ids=[5, 90, 5]), prompt(6))
    assert entry.top == ()
    assert [token for token, _ in entry.given] == [5, 90, 5]
    assert [value for _, value in entry.given] == pytest.approx(expected[[5, 90, 5]].tolist(), abs=1e-5)


def test_processed_equals_transformers_chain(model: Llama) -> None:
    transformers = pytest.importorskip("transformers")
    logits = logits_after(model, prompt(6))[-1:]
    sampling = SamplingParams(
        temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.4, logprobs=-1, logprobs_mode="processed"
    )
    for processor in (
        transformers.RepetitionPenaltyLogitsProcessor(1.4),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(30),
        transformers.TopPLogitsWarper(0.9),
    ):
        logits = processor(torch.tensor([prompt(6)]), logits)
    expected = logits.log_softmax(-1)[0]
    entry = first_entry(model, sampling, prompt(6))
    values = torch.tensor([value for _, value in sorted(entry.top)])
    assert values.isfinite().tolist() == expected.isfinite().tolist()
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
    assert first_entry(model, sampling, prompt(6)) == entry


def test_processed_logprobs_of_greedy_rows_are_at_temperature_one(model: Llama) -> None:
    bias = {7: 50.0}
    logits = logits_after(model, prompt(6))[-1]
    logits[7] += 50.0
    expected = logits.log_softmax(-1)
    entry = first_entry(
        model, SamplingParams(temperature=0, logit_bias=bias, logprobs=0, logprobs_mode="processed"), prompt(6)
    )
    assert (entry.token_id, entry.rank) == (7, 1)
    assert entry.logprob == pytest.approx(expected[7].item(), abs=1e-5)


def test_rows_that_share_logits_each_get_their_own() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    shared = np.array([2, 0, 2, 1])
    wanted = WantedLogprobs(
        places=np.array([0, 2, 3]),
        num_top=[1, 0, 2],
        given=[(), (4,), ()],
        processed=np.array([False, True, False]),
        temperature=np.array([1.0, 2.0, 0.0], np.float32),
    )
    values = wanted.raw(logits, shared)
    wanted.replace_processed(values, logits, shared)
    entries = wanted.entries(values, torch.tensor([1, 2, 3, 4]), 4)
    assert entries[1] is None
    assert entries[0] is not None
    assert entries[0].logprob == logits[2].log_softmax(-1)[1]
    assert entries[2] is not None
    assert entries[2].given == ((4, (logits[2] / 2).log_softmax(-1)[4].item()),)
    assert entries[3] is not None
    assert len(entries[3].top) == 2
    assert entries[3].logprob == logits[1].log_softmax(-1)[4]


# -- of prompts --------------------------------------------------------------------------------------------------


def assert_describes(entries: tuple[TokenLogprobs, ...], model: Llama, token_ids: list[int], num_top: int) -> None:
    expected = logits_after(model, token_ids).log_softmax(-1)
    assert [entry.token_id for entry in entries] == token_ids[1:]
    for position, entry in enumerate(entries):
        row = expected[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-5)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert [token for token, _ in entry.top] == row.argsort(descending=True)[:num_top].tolist()


@pytest.mark.parametrize(
    "chunks", [[23], [10, 10, 3], [1] * 23, [22, 1]], ids=["whole", "chunks", "ones", "last alone"]
)
def test_prompt_logprobs_do_not_depend_on_chunks(model: Llama, chunks: list[int]) -> None:
    driver = Driver(make_runner(model))
    token_ids = prompt(23)
    driver.add(6, prompt(3, seed=8))
    driver.add(3, token_ids, SamplingParams(temperature=0, prompt_logprobs=3))
    driver.add(2, prompt(1), SamplingParams(temperature=0, prompt_logprobs=0))
    outputs = []
    for index, chunk in enumerate(chunks):
        batch, output = driver.run({6: 3, 3: chunk, 2: 1} if index == 0 else {6: 1, 3: chunk, 2: 1})
        outputs.append((batch, output))
        of_prompts = output.prompt_logprobs or {}
        if index == 0:
            assert of_prompts.pop(rows_of(batch).index(2)) == ()
        assert bool(of_prompts) == (index == len(chunks) - 1)
    batch, output = outputs[-1]
    assert output.prompt_logprobs is not None
    assert_describes(output.prompt_logprobs[rows_of(batch).index(3)], model, token_ids, 3)
    _, output = driver.run({6: 1, 3: 1})
    assert output.prompt_logprobs is None


def run(engine: Engine, *requests: Request) -> dict[str, list[tuple[TokenLogprobs, ...]]]:
    found: dict[str, list[tuple[TokenLogprobs, ...]]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
            if update.prompt_logprobs is not None:
                assert update.index == 0
                found[update.request_id].append(update.prompt_logprobs)
    return found


def test_a_prompt_is_reported_once_though_it_is_cached_forked_and_preempted(model: Llama) -> None:
    scheduler = Scheduler(CacheManager(20, 4), max_num_seqs=8, max_num_batched_tokens=9, max_model_len=60)
    engine = Engine(scheduler, InlineExecutor(make_runner(model, num_blocks=20)))

    def request(name: str, length: int, **changes: int) -> Request:
        sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=12, **changes)
        return Request(request_id=name, inputs=(TokenSpan(tuple(prompt(length))),), sampling=sampling)

    run(engine, request("fills the cache", 21))
    requests = [request("a", 21, prompt_logprobs=2, n=3), request("b", 17, prompt_logprobs=2), request("c", 21)]
    found = run(engine, *requests)
    assert scheduler.counters.num_preemptions > 0
    assert found["c"] == []
    for name, length in (("a", 21), ("b", 17)):
        (entries,) = found[name]
        assert_describes(entries, model, prompt(length), 2)
