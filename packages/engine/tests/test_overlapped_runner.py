"""OverlappedRunner: the tokens of a ModelRunner, on a device that computes late and answers out of order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.engine import Engine
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.executor.overlapped import OverlappedExecutor
from octavo_engine.models.llama import Llama
from octavo_engine.overlap import OverlapStats
from octavo_engine.runner.late_device import LateDevice, LateEvent
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.runner.overlapped_runner import OverlappedRunner
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import random_model, tiny_config
from octavo_engine.types import FinishReason, Request, SamplingParams, SequenceUpdate, TokenSpan
from octavo_kvcache import BlockCopy, CacheManager
from octavo_kvcache.storage import KVStorage

VOCAB_SIZE = 97
BLOCK_SIZE = 4
MAX_NUM_SEQS = 6
MAX_NUM_BATCHED_TOKENS = 24
STOP = 5
GREEDY = SamplingParams(temperature=0)

DELAYS = [pytest.param(0, id="at once"), pytest.param(1, id="one late"), pytest.param(4, id="four late")]


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(vocab_size=VOCAB_SIZE))


class Setup(NamedTuple):
    engine: Engine
    runner: ModelRunner


def setup_of(model: Llama, device: LateDevice | None, *, num_blocks: int = 200, depth: int = 2) -> Setup:
    """Return an engine whose KV cache is full of NaN: on a late device, or inline if there is none."""
    storage = KVStorage(model.kv_cache_specs(torch.float32), num_blocks, BLOCK_SIZE)
    for layer in range(storage.num_layers):
        for cache in storage.layer(layer):
            cache.fill_(float("nan"))
    options: dict[str, Any] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "max_model_len": model.config.max_position_embeddings,
    }
    executor: InlineExecutor
    if device is None:
        runner = ModelRunner(model, storage, **options)
        executor = InlineExecutor(runner)
    else:
        runner = OverlappedRunner(model, storage, gpu=device, max_in_flight=depth, **options)
        executor = OverlappedExecutor(runner)
    scheduler = Scheduler(CacheManager(num_blocks, BLOCK_SIZE), eos_token_ids=(STOP,), **options)
    return Setup(Engine(scheduler, executor), runner)


class Answer(NamedTuple):
    token_ids: tuple[int, ...]
    logprobs: tuple[Any, ...]
    finish_reason: FinishReason | None
    pooled: tuple[float, ...] | None
    error: str | None


def run(engine: Engine, requests: list[Request], aborts: dict[str, int], rng: random.Random) -> dict[Any, Answer]:
    """Run requests that arrive by chance; those in `aborts` are aborted once so many of their tokens have come."""
    updates: dict[tuple[str, int], list[SequenceUpdate]] = {}
    waiting = requests[::-1]
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        for update in engine.step():
            seen = updates.setdefault((update.request_id, update.index), [])
            seen.append(update)
            if sum(len(u.token_ids) for u in seen) == aborts.get(update.request_id):
                for end in engine.abort(update.request_id, update.index):
                    updates[end.request_id, end.index].append(end)
    return {key: _joined(of_one) for key, of_one in updates.items()}


def _joined(updates: list[SequenceUpdate]) -> Answer:
    last = updates[-1]
    return Answer(
        tuple(token_id for update in updates for token_id in update.token_ids),
        tuple(entry for update in updates for entry in update.logprobs or ()),
        last.finish_reason,
        last.pooled,
        last.error,
    )


def requests_of(seed: int, *, free: bool) -> tuple[list[Request], dict[str, int]]:
    """Make requests that share beginnings; `free` ones go without the host."""
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    requests, aborts = [], {}
    for number in range(14):
        name = f"{number}"
        tokens = stem[: rng.choice((0, 9, 17, 40))] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        inputs, kind = (TokenSpan(tuple(tokens)),), 1.0 if free else rng.random()
        if kind < 0.15:
            requests.append(Request(request_id=name, inputs=inputs, task="embed", pooling=rng.choice(("last", "mean"))))
            continue
        if kind < 0.3:
            beams = BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True)
            requests.append(Request(request_id=name, inputs=inputs, sampling=beams.sampling(), beams=beams))
            continue
        ruled: dict[str, Any] = {}
        if not free and rng.random() < 0.5:
            ruled = rng.choice(
                (
                    {"repetition_penalty": 1.4},
                    {"logprobs": 3},
                    {"prompt_logprobs": 2, "logprobs": 0},
                    {"mirostat_mode": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
                    {"typical_p": 0.8},
                )
            )
        options: dict[str, Any] = {
            "n": rng.choice((1, 1, 3)),
            "temperature": rng.choice((0.0, 1.0)),
            "top_p": rng.choice((1.0, 0.9)),
            "top_k": rng.choice((0, 20)),
            "min_tokens": rng.choice((0, 0, 6)),
            "logit_bias": rng.choice(({}, {STOP: 2.0, 9: 1.5})),
            "allowed_token_ids": rng.choice((None, None, tuple(range(60)))),
            "seed": rng.getrandbits(30),
            "max_tokens": rng.randint(7, 18),
        }
        sampling = SamplingParams(**options | ruled)
        requests.append(Request(request_id=name, inputs=inputs, sampling=sampling, priority=rng.choice((0, 1))))
        if rng.random() < 0.2:
            aborts[name] = rng.randint(1, 5)
    return requests, aborts


@pytest.mark.parametrize("free", [pytest.param(True, id="free rows"), pytest.param(False, id="ruled rows too")])
@pytest.mark.parametrize("num_late", DELAYS)
def test_answers_are_those_of_the_inline_executor(model: Llama, num_late: int, free: bool) -> None:
    num_preemptions = num_hits = num_reordered = num_ahead = 0
    for seed in range(2):
        requests, aborts = requests_of(seed, free=free)
        expected = run(setup_of(model, None).engine, requests, aborts, random.Random(seed))
        for depth, num_blocks in ((2, 20), (3, 200)):
            device = LateDevice(num_late=num_late, seed=seed)
            engine = setup_of(model, device, num_blocks=num_blocks, depth=depth).engine
            assert run(engine, requests, aborts, random.Random(seed)) == expected
            counters = engine.scheduler.counters
            num_preemptions += counters.num_preemptions
            num_hits += counters.cached_prompt_tokens.total
            num_reordered += device.num_reordered
            num_ahead += device.num_unfinished_launches
    assert num_preemptions > 3
    assert num_hits > 50
    assert num_reordered > 10
    assert (num_ahead > 20) is (num_late > 0)


def request(name: str, tokens: list[int], **options: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, "ignore_eos": True} | options)
    return Request(request_id=name, inputs=(TokenSpan(tuple(tokens)),), sampling=sampling)


def test_free_steps_overlap_and_others_say_why_not(model: Llama) -> None:
    setup = setup_of(model, LateDevice(num_late=2))
    executor = setup.engine._executor
    run(setup.engine, [request("a", [1, 2, 3]), request("b", [4, 5], temperature=1.0)], {}, random.Random(0))
    free = executor.overlap
    assert free.num_overlapped == setup.engine.scheduler.counters.num_steps > 5
    assert free.num_waited == {}
    ruled = [request("c", [1, 2, 3], presence_penalty=1.0), request("d", [7, 8], logprobs=2)]
    for one in ruled:
        run(setup.engine, [one], {}, random.Random(0))
    assert executor.overlap == OverlapStats(free.num_overlapped, {"rules": 6, "logprobs": 6})


def test_chunks_of_a_ruled_prompt_overlap(model: Llama) -> None:
    setup = setup_of(model, LateDevice(num_late=2))
    long = [number % VOCAB_SIZE for number in range(3 * MAX_NUM_BATCHED_TOKENS)]
    run(setup.engine, [request("a", long, presence_penalty=1.0, max_tokens=1)], {}, random.Random(0))
    assert setup.engine._executor.overlap == OverlapStats(2, {"rules": 1})


def test_result_that_is_read_too_early_is_poison(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(setup_of(model, LateDevice(num_late=3)).engine, [request("a", [1, 2, 3])], {}, random.Random(0))
    assert [answer.error for answer in expected.values()] == [None]
    monkeypatch.setattr(LateEvent, "wait", lambda self: None)
    spoiled = run(setup_of(model, LateDevice(num_late=3)).engine, [request("a", [1, 2, 3])], {}, random.Random(0))
    assert [answer.error for answer in spoiled.values()] == [
        "the model's output for this sequence is not a finite number"
    ]


def test_drained_engine_holds_nothing_of_what_was_aborted(model: Llama) -> None:
    engine = setup_of(model, LateDevice(num_late=3)).engine
    engine.add(request("a", [1, 2, 3]))
    assert engine.step() == []
    assert [len(update.token_ids) for update in engine.step()] == [1]
    engine.abort("a")
    assert (engine.has_work, engine.scheduler.cache.stats().num_used > 0) == (True, True)
    engine.drain()
    assert (engine.has_work, engine.scheduler.cache.stats().num_used) == (False, 0)


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        pytest.param(LateEvent, "wait", id="waiting for a step"),
        pytest.param(OverlappedRunner, "_run_ahead", id="launching one"),
        pytest.param(OverlappedExecutor, "submit", id="submitting one"),
    ],
)
def test_interrupted_engine_serves_the_next_request(
    model: Llama, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    engine = setup_of(model, LateDevice(num_late=3)).engine
    engine.add(request("a", [1, 2, 3]))
    assert engine.step() == []
    with monkeypatch.context() as patched:
        patched.setattr(owner, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.abort("a")
    engine.drain()
    assert (engine.has_work, engine.scheduler.cache.stats().num_used) == (False, 0)
    after = run(engine, [request("b", [9, 8, 7])], {}, random.Random(0))
    assert after == run(setup_of(model, None).engine, [request("b", [9, 8, 7])], {}, random.Random(0))


def test_parcel_that_is_packed_too_early_is_noticed(model: Llama) -> None:
    setup = setup_of(model, LateDevice(num_late=3))
    setup.runner._parcels._sources[1:] = setup.runner._parcels._sources[:1]  # type: ignore[attr-defined]
    answers = run(setup.engine, [request("a", [1, 2, 3, 4])], {}, random.Random(0))  # the next step needs a block
    assert all("was written to while its copy" in str(answer.error) for answer in answers.values())


class FailingModel:
    """A model of which one step, or each of some, raises."""

    def __init__(self, model: Llama, fails: Callable[[ModelInput], bool]) -> None:
        self.__dict__.update(_model=model, _fails=fails)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, model_input: ModelInput) -> Tensor:
        if self._fails(model_input):
            raise RuntimeError("the device gave up")
        return self._model(model_input)


@pytest.mark.parametrize("num_late", DELAYS)
def test_failed_step_ends_its_own_sequences_alone(model: Llama, num_late: int) -> None:
    def fails(model_input: ModelInput) -> bool:
        return 96 in model_input.token_ids

    def waves() -> Iterator[list[Request]]:
        yield [request("good", [1, 2, 3], max_tokens=12), request("other", [4, 5])]
        yield [request("bad", [3, 96, 4], n=2)]
        yield [request("late", [9, 9]), request("later", [8, 1, 8, 1, 8], temperature=1.0, seed=1)]

    def answers_of(failing: bool) -> dict[Any, Answer]:
        setup = setup_of(model, LateDevice(num_late=num_late, seed=2))
        if failing:
            setup.runner.model = FailingModel(model, fails)  # type: ignore[assignment]
        answers: dict[Any, Answer] = {}
        for wave in waves():
            answers |= run(setup.engine, wave, {}, random.Random(0))
        return answers

    failed, whole = answers_of(failing=True), answers_of(failing=False)
    assert {name: answer for (name, _), answer in failed.items() if name != "bad"} == {
        name: answer for (name, _), answer in whole.items() if name != "bad"
    }
    assert failed["bad", 0].error == "RuntimeError: the device gave up"


def decode(step_id: int, *rows: tuple[int, int]) -> ScheduledBatch:
    """Return a step in which rows go on at some positions, none of which begins a block."""
    return ScheduledBatch(step_id=step_id, cached=tuple(CachedRow(row, position, 1, True) for row, position in rows))


def enter(
    row: int, tokens: tuple[int, ...], block_ids: tuple[int, ...], sampling: SamplingParams = GREEDY, **options: Any
) -> NewRow:
    return NewRow(
        row=row,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        sampling=sampling,
        seed=0,
        sequence_index=0,
        stop_token_ids=frozenset(),
        block_ids=(block_ids,),
        num_computed_tokens=0,
        num_scheduled_tokens=len(tokens),
        samples=True,
        **options,
    )


def test_steps_scheduled_with_a_row_that_failed_leave_it_out(model: Llama) -> None:
    """The row never entered: its block table is whatever was there before, maybe another sequence's blocks."""
    runner = setup_of(model, LateDevice(num_late=1), depth=3).runner
    assert isinstance(runner, OverlappedRunner)
    expected = setup_of(model, None).runner
    begin = ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)),))
    first = expected.execute(begin), expected.execute(decode(1, (0, 2))), expected.execute(decode(3, (0, 3)))
    began = runner.launch(begin)
    runner.model = FailingModel(model, lambda _: False)  # type: ignore[assignment]
    storage, runner.storage = runner.storage, None  # type: ignore[assignment]
    broken = runner.launch(ScheduledBatch(step_id=1, new=(enter(1, (7, 8), (9, 10)),), copies=(BlockCopy(1, 2),)))
    runner.storage = storage
    mixed = runner.launch(decode(2, (1, 2), (0, 2)))
    assert began.result() == first[0]
    with pytest.raises(AttributeError):
        broken.result()
    answer = mixed.result()
    assert answer.errors == {0: "an earlier step of this sequence failed"}
    assert answer.token_ids == ((), first[1].token_ids[0])
    last = runner.launch(ScheduledBatch(step_id=3, cached=(CachedRow(0, 3, 1, True),), finished=(1,)))
    assert last.result() == first[2]


def test_answer_of_a_sequence_that_left_is_not_the_next_ones(model: Llama) -> None:
    runner = setup_of(model, LateDevice(num_late=5), depth=3).runner
    expected = setup_of(model, None).runner
    assert isinstance(runner, OverlappedRunner)
    leaving = runner.launch(ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)),)))
    entering = ScheduledBatch(step_id=1, new=(enter(0, (7, 8, 9), (7, 8)),), finished=(0,))
    entered = runner.launch(entering)
    assert len(leaving.result().token_ids[0]) == 1
    assert entered.result() == expected.execute(entering)
    assert runner.launch(decode(2, (0, 3))).result() == expected.execute(decode(2, (0, 3)))
    assert runner._rows.token_ids[0, :4].tolist() == expected._rows.token_ids[0, :4].tolist()


RULED = SamplingParams(temperature=0, presence_penalty=1.0)
AHEAD_THEN_HERE = [
    ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)),)),
    decode(1, (0, 2)),
    ScheduledBatch(step_id=2, new=(enter(0, (7, 8, 9), (7, 8)), enter(1, (4,), (9,), RULED)), finished=(0,)),
    ScheduledBatch(step_id=3, cached=(CachedRow(0, 3, 1, True),), finished=(1,)),
]
HERE_THEN_AHEAD = [
    ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)), enter(1, (4,), (9,), RULED))),
    decode(1, (0, 2), (1, 1)),
    ScheduledBatch(step_id=2, new=(enter(0, (7, 8, 9), (7, 8)),), finished=(0,)),
    decode(3, (0, 3), (1, 2)),
]


@pytest.mark.parametrize(
    "steps",
    [pytest.param(AHEAD_THEN_HERE, id="entered with the host"), pytest.param(HERE_THEN_AHEAD, id="entered without it")],
)
def test_row_that_changed_hands_goes_on_where_its_predecessor_would_have(
    model: Llama, steps: list[ScheduledBatch]
) -> None:
    """Steps with and without the host fill buffers of their own, each of which saw only one of the two sequences."""
    runner, expected = setup_of(model, LateDevice(num_late=1)).runner, setup_of(model, None).runner
    assert [runner.execute(step) for step in steps] == [expected.execute(step) for step in steps]
    for cache in runner.storage.layer(0):
        assert cache[7].isfinite().all()  # its fourth token too is in its own block


def test_executor_counts_on_when_it_gets_another_runner(model: Llama) -> None:
    executor = OverlappedExecutor(None)
    assert (executor.max_in_flight, executor.overlap) == (1, OverlapStats())
    for _ in range(2):
        executor.use(setup_of(model, LateDevice(num_late=1), depth=2).runner)
        executor.submit(ScheduledBatch(step_id=0, new=(enter(0, (1, 2), (5, 6)),))).result()
        assert executor.max_in_flight == 2
    executor.use(None)
    assert executor.overlap == OverlapStats(2, {})
