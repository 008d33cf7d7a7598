"""ModelRunner: steps on rows, with a tiny random Llama and a KV cache full of NaN."""

from __future__ import annotations

import os
import random

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.batch import CachedRow, ModelOutput, ScheduledBatch
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.models.llama import Llama
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.testing import Driver, make_runner, random_model, rows_of, tiny_config
from octavo_engine.types import Pooling, SamplingParams
from octavo_kvcache import TableUpdate

VOCAB_SIZE = 97
HOT = SamplingParams(temperature=1.0)
COLD = SamplingParams(temperature=0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where a step takes a third of a second
ONCE_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="an interpreter's time is spent on one variant")


@pytest.fixture(scope="module")
def model(device: str) -> Llama:
    return random_model(tiny_config(vocab_size=VOCAB_SIZE), device=device)


@pytest.fixture
def driver(model: Llama) -> Driver:
    return Driver(make_runner(model))


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def generated(
    model: Llama, token_ids: list[int], num_tokens: int, sampling: SamplingParams, seed: int = 0
) -> list[int]:
    """Generate for one sequence alone."""
    driver = Driver(make_runner(model))
    driver.add(0, token_ids, sampling, seed=seed)
    return driver.generate(num_tokens)[0]


def test_chunks_before_the_last_draw_nothing(driver: Driver) -> None:
    driver.add(0, prompt(9))
    assert driver.step({0: 4}) == {0: ()}
    assert driver.step({0: 4}) == {0: ()}
    assert [len(ids) for ids in driver.step({0: 1}).values()] == [1]


def test_answers_stand_in_the_batchs_order(driver: Driver) -> None:
    driver.add(3, prompt(4, seed=3))
    driver.step({3: 4})
    driver.add(1, prompt(5, seed=1))
    batch, output = driver.run({3: 1, 1: 2})
    assert rows_of(batch) == [1, 3]
    assert [len(ids) for ids in output.token_ids] == [0, 1]


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(COLD, id="greedy", marks=ONCE_INTERPRETED),
        pytest.param(HOT, id="random"),
        pytest.param(
            SamplingParams(temperature=0.8, top_p=0.9, presence_penalty=1.0), id="penalised", marks=ONCE_INTERPRETED
        ),
    ],
)
def test_tokens_do_not_depend_on_the_batch(model: Llama, sampling: SamplingParams) -> None:
    num_rows, num_tokens = (3, 4) if INTERPRETED else (5, 10)
    driver = Driver(make_runner(model))
    for row in range(num_rows):
        driver.add(row, prompt(3 + 4 * row, seed=row), sampling, seed=100 + row)
    together = driver.generate(num_tokens)
    for row in range(num_rows):
        alone = generated(model, prompt(3 + 4 * row, seed=row), num_tokens, sampling, seed=100 + row)
        assert together[row] == alone


def test_resumed_sequence_goes_on_with_the_same_tokens(model: Llama) -> None:
    num_before, num_after = (4, 2) if INTERPRETED else (7, 5)
    num_tokens = num_before + num_after
    sampling = SamplingParams(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=num_tokens)
    tokens = prompt(6)
    whole = generated(model, tokens, num_tokens, sampling, seed=5)
    driver = Driver(make_runner(model), seed=2)
    driver.add(4, tokens + whole[:num_before], sampling, num_prompt_tokens=6, seed=5)
    assert driver.generate(num_after)[4] == whole[num_before:]


def test_runner_appends_what_it_draws_to_its_own_rows(model: Llama) -> None:
    driver = Driver(make_runner(model))
    driver.add(0, prompt(4))
    _, output = driver.run({0: 4})
    expected = generated(model, prompt(4), 3, COLD)
    # The next batches name no token: the runner knows them.
    outputs = [output]
    for position, updates in ((4, (TableUpdate(1, (40,)),)), (5, ())):
        step = ScheduledBatch(step_id=position, cached=(CachedRow(0, position, 1, True, updates),))
        outputs.append(driver.runner.execute(step))
    assert [o.token_ids[0][0] for o in outputs] == expected


def test_finished_rows_are_free_for_others(model: Llama, driver: Driver) -> None:
    driver.add(0, prompt(5, seed=1), SamplingParams(temperature=0, presence_penalty=1.5, logprobs=3))
    driver.generate(4)
    driver.add(1, prompt(2, seed=2))
    driver.step({1: 2}, finished=[0])
    driver.add(0, prompt(7, seed=3))
    driver.step({0: 7, 1: 1})
    driver.step({0: 1, 1: 1})
    assert driver.rows[0].token_ids[7:] == generated(model, prompt(7, seed=3), 2, COLD)
    assert driver.rows[1].token_ids[2:] == generated(model, prompt(2, seed=2), 3, COLD)


# -- several samples of one prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length",
    [pytest.param(6, id="partial last block"), pytest.param(8, id="full last block", marks=ONCE_INTERPRETED)],
)
def test_forks_draw_from_their_parents_logits(model: Llama, length: int) -> None:
    num_tokens = 3 if INTERPRETED else 8
    driver = Driver(make_runner(model))
    driver.add(2, prompt(length), HOT, seed=9)
    driver.add(5, prompt(4, seed=1))
    for index, row in ((1, 0), (2, 7)):
        driver.add(row, prompt(length), HOT, seed=9, sequence_index=index, fork_of=2)
    answers = driver.generate(num_tokens)
    for index, row in ((0, 2), (1, 0), (2, 7)):
        alone = Driver(make_runner(model))
        alone.add(0, prompt(length), HOT, seed=9, sequence_index=index)
        assert answers[row] == alone.generate(num_tokens)[0]
    assert answers[5] == generated(model, prompt(4, seed=1), num_tokens, COLD)
    assert len({tuple(answers[row]) for row in (0, 2, 7)}) == 3


def test_fork_of_a_prompt_that_ends_in_a_later_chunk(model: Llama) -> None:
    driver = Driver(make_runner(model))
    driver.add(1, prompt(9), HOT, seed=3)
    driver.step({1: 5})
    driver.add(0, prompt(9), HOT, seed=3, sequence_index=1, fork_of=1)
    drawn = driver.step({1: 4, 0: 0})
    alone = Driver(make_runner(model))
    alone.add(0, prompt(9), HOT, seed=3, sequence_index=1)
    assert drawn[0] == alone.step({0: 9})[0]
    assert drawn[1] == tuple(generated(model, prompt(9), 1, HOT, seed=3))


# -- log-probabilities, embeddings, errors -----------------------------------------------------------------------


def test_logprobs_stand_beside_the_rows_that_asked(driver: Driver) -> None:
    driver.add(0, prompt(3))
    driver.add(1, prompt(5), SamplingParams(temperature=0, logprobs=2))
    driver.add(2, prompt(9), SamplingParams(temperature=0, logprobs=2))
    _, output = driver.run({0: 3, 1: 5, 2: 4})
    assert output.logprobs is not None
    assert output.logprobs[0] is None
    assert output.logprobs[2] is None
    assert output.logprobs[1] is not None
    (entry,) = output.logprobs[1]
    assert entry.token_id == output.token_ids[1][0]
    assert entry.rank == 1
    assert entry.top[0] == (entry.token_id, entry.logprob)


def test_no_logprobs_when_nobody_asks(driver: Driver) -> None:
    driver.add(0, prompt(3))
    _, output = driver.run({0: 3})
    assert output == ModelOutput(token_ids=output.token_ids)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([11], id="whole"),
        pytest.param([4, 4, 3], id="chunked"),
        pytest.param([1] * 11, id="one by one", marks=ONCE_INTERPRETED),
    ],
)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embedding_is_the_pooled_hidden_state_of_unit_length(model: Llama, pooling: Pooling, chunks: list[int]) -> None:
    kept: list[torch.Tensor] = []
    whole = Driver(make_runner(model, watch=lambda _, hidden: kept.append(hidden.cpu().clone())))
    whole.add(0, prompt(11))
    whole.step({0: 11})
    (hidden,) = kept
    vector = hidden[-1] if pooling == "last" else hidden.mean(0)

    driver = Driver(make_runner(model))
    driver.add(6, prompt(3, seed=8))
    driver.add(3, prompt(11), task="embed", pooling=pooling)
    outputs = []
    for index, chunk in enumerate(chunks):
        batch, output = driver.run({6: 3 if index == 0 else 1, 3: chunk})
        outputs.append(output)
    place = rows_of(batch).index(3)
    assert all(o.pooled is None for o in outputs[:-1])
    assert outputs[-1].token_ids[place] == ()
    assert outputs[-1].pooled is not None
    assert list(outputs[-1].pooled) == [place]
    pooled = torch.tensor(outputs[-1].pooled[place])
    torch.testing.assert_close(pooled, vector / vector.norm(), atol=1e-5, rtol=1e-4)
    assert pooled.norm().item() == pytest.approx(1.0, abs=1e-6)


def test_mean_starts_again_when_a_preempted_prompt_does(model: Llama) -> None:
    embeddings = []
    for interrupted in (False, True):
        driver = Driver(make_runner(model))
        driver.add(0, prompt(8), task="embed", pooling="mean")
        if interrupted:
            driver.step({0: 5})
            driver.add(1, prompt(2))
            driver.step({1: 2}, finished=[0])
            driver.add(0, prompt(8), task="embed", pooling="mean")
        _, output = driver.run({0: 8})
        assert output.pooled is not None
        embeddings.append(output.pooled[0])
    assert embeddings[0] == pytest.approx(embeddings[1], abs=1e-6)


def poison_token_13(model_input: ModelInput, hidden: torch.Tensor) -> None:
    hidden[model_input.token_ids == 13] = float("nan")


def test_row_with_nan_ends_alone(model: Llama) -> None:
    driver = Driver(make_runner(model, watch=poison_token_13))
    good, bad = [1, 2, 3], [4, 5, 13]
    driver.add(0, good, HOT, seed=1)
    driver.add(1, bad, HOT, seed=2)
    driver.add(2, bad, HOT, seed=2, sequence_index=1, fork_of=1)
    driver.add(3, bad, task="embed")
    _, output = driver.run({0: 3, 1: 3, 2: 0, 3: 3})
    message = "the model's output for this sequence is not a finite number"
    assert output.errors == {1: message, 2: message, 3: message}
    assert output.token_ids == (tuple(generated(model, good, 1, HOT, seed=1)), (), (), ())
    assert output.pooled is None
    assert [len(ids) for ids in driver.step({0: 1}, finished=[1, 2, 3]).values()] == [1]


def test_batch_without_rows_answers_nothing(driver: Driver) -> None:
    assert driver.runner.execute(ScheduledBatch(step_id=0, finished=(3,))) == ModelOutput(token_ids=())


# -- the inline executor -----------------------------------------------------------------------------------------


def test_inline_executor_runs_steps_at_once() -> None:
    class Counting:
        num_steps = 0

        def execute(self, batch: ScheduledBatch) -> ModelOutput:
            self.num_steps += 1
            if batch.step_id == 1:
                raise RuntimeError("step 1 was told to fail")
            return ModelOutput(token_ids=())

    runner = Counting()
    executor = InlineExecutor(runner)
    assert executor.max_in_flight == 1
    failing = executor.submit(ScheduledBatch(step_id=1))
    working = executor.submit(ScheduledBatch(step_id=2))
    assert runner.num_steps == 2
    with pytest.raises(RuntimeError, match="step 1 was told to fail"):
        failing.result()
    assert working.result() == ModelOutput(token_ids=())
