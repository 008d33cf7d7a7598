"""The asyncio front end on a fake model whose tokens are letters."""

import asyncio
import sys
import threading
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from octavo_engine.api import EngineInfo
from octavo_engine.async_engine import AsyncEngine
from octavo_engine.branch import Branch
from octavo_engine.engine import Engine
from octavo_engine.errors import (
    EngineAsleep,
    EngineDead,
    EngineInUse,
    IncompatibleWeights,
    InvalidRequest,
    ModelNotFound,
    PinLimitReached,
    PromptTooLong,
    RequestFailed,
    UnknownPin,
)
from octavo_engine.executor.fake import FakeExecutor
from octavo_engine.pins import Pin
from octavo_engine.scheduler import Scheduler
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer, TokenizerRules
from octavo_engine.types import CachedTokens, FinishReason, SamplingParams
from octavo_engine.warming import warm_request
from octavo_kvcache import CacheManager

END = 26
INFO = EngineInfo(
    model_name="letters",
    architecture="fake",
    dtype="float32",
    kv_dtype="float32",
    mode="exact",
    device="cpu",
    kernel_backend="fake",
    deterministic=True,
    vocab_size=27,
    max_model_len=40,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    block_size=4,
    num_blocks=64,
    kv_cache_bytes=0,
    kv_cache_reason="fake",
    num_parameters=0,
    load_seconds=0.0,
)


class LetterBackend:
    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def token(self, token_id: int) -> str | None:
        return chr(ord("a") + token_id) if token_id < END else "<end>"

    def token_id(self, token: str) -> int | None:
        return END if token == "<end>" else ord(token) - ord("a")


RULES = TokenizerRules(
    bytes_of=str.encode,
    strip_leading_space=False,
    special_token_ids=frozenset({END}),
    special_tokens={"eos_token": "<end>"},
)


def following_letter(token_ids, sequence_index: int) -> int:
    """The alphabet goes on; a sample of index i skips i letters. After z comes the end."""
    return min(token_ids[-1] + 1 + sequence_index, END)


class Gate:
    """Lets so many steps through, so that a test decides what happens meanwhile."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(1000)

    def allow_only(self, num_steps: int) -> None:
        self.steps = threading.Semaphore(num_steps)

    def open(self) -> None:
        self.steps.release(1000)


class GatedExecutor(FakeExecutor):
    gate: Gate

    def submit(self, batch):
        assert self.gate.steps.acquire(timeout=10)
        return super().submit(batch)


@dataclass(frozen=True)
class FakeWeights:
    digest: bytes
    root: bytes


class FakeHost:
    """A model that is put aside and brought back in a moment, and files that a test replaces."""

    def __init__(self) -> None:
        self.files = {None: b"old", "new.gguf": b"new"}
        self.weights: FakeWeights | None = FakeWeights(b"old", b"old root")
        self.has_cache = True
        self.reading: threading.Event | None = None

    def load(self, model, digest):
        if self.reading is not None:
            assert self.reading.wait(10)
        if model not in self.files:
            raise ModelNotFound(f"{model}: no such file")
        found = self.files[model]
        if found == b"foreign" or (digest is not None and digest != found):
            raise IncompatibleWeights(f"{model}: found {found!r}")
        return FakeWeights(found, found + b" root")

    def use(self, weights):
        self.weights = weights

    def allocate(self):
        self.has_cache = True

    def drop(self):
        self.weights, self.has_cache = None, False

    def bytes_in_use(self):
        return 1000 * (self.weights is not None) + 100 * self.has_cache


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def engine(gate: Gate, host: FakeHost):
    scheduler = Scheduler(
        CacheManager(64, 4, max_num_pinned=6),
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=40,
        eos_token_ids=[END],
    )
    executor = GatedExecutor(4, following_letter, fail_steps=frozenset({1000}))
    executor.gate = gate
    text = TextProcessor(Tokenizer(LetterBackend(), RULES), None, max_model_len=40, max_num_seqs=4, vocab_size=27)
    engine = AsyncEngine(Engine(scheduler, executor, host), text, INFO)
    yield engine
    gate.open()
    engine.close()


def request(engine: AsyncEngine, prompt: str, request_id: str = "r", **sampling):
    sampling.setdefault("max_tokens", 5)
    ids = engine.text.encode_prompt(prompt)
    return engine.text.make_request(ids, SamplingParams(temperature=0, **sampling), request_id=request_id)


@pytest.fixture(params=["generate", "run"], autouse=True)
def way(request, monkeypatch):
    """Both ways to read an answer bring the same: `collect` takes them in turn."""
    monkeypatch.setattr(sys.modules[__name__], "READ", request.param)


READ = "generate"


async def collect(engine: AsyncEngine, own) -> dict[int, tuple[str, FinishReason, str | int | None]]:
    texts: dict[int, str] = {}
    ends = {}

    def take(deltas):
        assert deltas
        for delta in deltas:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            if delta.finish_reason is not None:
                assert delta.index not in ends
                ends[delta.index] = (delta.finish_reason, delta.stop_reason)

    if READ == "run":
        await engine.run(own, take)
    else:
        async with aclosing(engine.generate(own)) as stream:
            async for deltas in stream:
                take(deltas)
    return {i: (texts[i], *ends[i]) for i in ends}


async def until_idle(engine: AsyncEngine) -> None:
    async with asyncio.timeout(10):
        while engine.stats().cache.num_used or engine.stats().num_running or engine.stats().num_waiting:
            await asyncio.sleep(0.001)


def test_a_request_streams_to_its_end(engine):
    assert asyncio.run(collect(engine, request(engine, "abc"))) == {0: ("defgh", FinishReason.LENGTH, None)}


def test_the_end_token_is_not_text(engine):
    assert asyncio.run(collect(engine, request(engine, "x", max_tokens=9))) == {0: ("yz", FinishReason.STOP, None)}


def test_samples_end_on_their_own(engine):
    ends = asyncio.run(collect(engine, request(engine, "t", n=3, max_tokens=6)))
    assert ends == {
        0: ("uvwxyz", FinishReason.LENGTH, None),
        1: ("vxz", FinishReason.STOP, None),
        2: ("wz", FinishReason.STOP, None),
    }


def test_a_stop_string_ends_the_sequence_in_the_engine_too(engine, gate):
    async def main():
        gate.allow_only(6)
        ends = await collect(engine, request(engine, "a", stop=["fg"], max_tokens=30))
        gate.open()
        await until_idle(engine)
        return ends

    assert asyncio.run(main()) == {0: ("bcde", FinishReason.STOP, "fg")}
    assert engine.stats().finished == {"abort": 1}


def test_a_stop_token_of_the_caller_is_left_out_unless_asked_for(engine):
    plain = asyncio.run(collect(engine, request(engine, "a", stop_token_ids=[4])))
    asked = asyncio.run(collect(engine, request(engine, "a", stop_token_ids=[4], include_stop_str_in_output=True)))
    assert (plain[0], asked[0]) == (("bcd", FinishReason.STOP, 4), ("bcde", FinishReason.STOP, 4))


def test_many_requests_share_the_engine(engine):
    async def main():
        requests = [request(engine, chr(97 + i), str(i), max_tokens=3) for i in range(12)]
        return await asyncio.gather(*(collect(engine, r) for r in requests))

    results = asyncio.run(main())
    assert [r[0][0] for r in results] == ["".join(chr(98 + i + j) for j in range(3)) for i in range(12)]


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_leaving_the_stream_aborts_the_request(engine, gate, num_steps: int):
    async def main():
        gate.allow_only(num_steps)
        stream = engine.generate(request(engine, "a", max_tokens=30, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        gate.open()
        await until_idle(engine)

    asyncio.run(main())
    assert engine.stats().finished == {"abort": 1}


def test_cancelling_the_reader_aborts_the_request(engine, gate):
    async def main():
        gate.allow_only(0)
        task = asyncio.create_task(collect(engine, request(engine, "a", max_tokens=30)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await until_idle(engine)

    asyncio.run(main())
    assert engine.stats().num_generation_tokens <= 1


def test_an_answer_that_cannot_be_taken_ends_that_request_alone(engine, gate):
    def refuse(deltas):
        raise ValueError("no room")

    async def main():
        gate.allow_only(1)
        failing = asyncio.create_task(engine.run(request(engine, "a", max_tokens=30, ignore_eos=True), refuse))
        other = asyncio.create_task(collect(engine, request(engine, "b", "other", max_tokens=20)))
        with pytest.raises(ValueError, match="no room"):
            await failing
        gate.open()
        assert (await other)[0][0] == "cdefghijklmnopqrstuv"
        await until_idle(engine)

    asyncio.run(main())
    assert engine.stats().finished == {"abort": 1, "length": 1}


def test_a_request_id_in_use_is_refused(engine, gate):
    async def main():
        gate.allow_only(1)
        async with aclosing(engine.generate(request(engine, "a", "same", max_tokens=30))) as stream:
            await anext(stream)
            with pytest.raises(RequestFailed, match="'same' is in use"):
                await collect(engine, request(engine, "b", "same"))
        gate.open()

    asyncio.run(main())


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(engine):
    engine._engine._executor.fail_steps = frozenset({0})
    with pytest.raises(RequestFailed, match="step 0 was told to fail"):
        asyncio.run(collect(engine, request(engine, "a")))
    assert asyncio.run(collect(engine, request(engine, "a")))[0][0] == "bcdef"


def test_a_broken_loop_is_told_to_everyone(engine, monkeypatch):
    def explode():
        raise ValueError("the scheduler is broken")

    monkeypatch.setattr(engine._engine.scheduler, "schedule", explode)
    with pytest.raises(EngineDead, match="the scheduler is broken"):
        asyncio.run(collect(engine, request(engine, "a")))
    with pytest.raises(EngineDead, match="the scheduler is broken"):
        engine.check_health()
    with pytest.raises(EngineDead):
        asyncio.run(collect(engine, request(engine, "a")))


def test_close_ends_those_who_wait(engine, gate):
    async def main():
        gate.allow_only(1)
        async with aclosing(engine.generate(request(engine, "a", max_tokens=30, ignore_eos=True))) as stream:
            await anext(stream)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))
            while not engine._commands.is_closing:
                await asyncio.sleep(0)
            gate.open()
            await closing
            with pytest.raises(EngineDead, match="closed"):
                async for _ in stream:
                    pass

    asyncio.run(main())


def test_an_embedding_comes_back(engine):
    ids = engine.text.encode_prompt("abcdef")
    own = engine.text.make_request(ids, SamplingParams(), request_id="e", task="embed")
    assert asyncio.run(engine.embed(own)).embedding == [1.0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, 27], "token id 27 is out of vocabulary; ids go from 0 to 26"),
        ([-1], "token id -1 is out of vocabulary"),
        ([1.5], "must hold integers"),
    ],
    ids=["no-text", "no-ids", "beyond", "negative", "float"],
)
def test_a_bad_prompt_is_refused(engine, prompt, message: str):
    with pytest.raises(InvalidRequest, match=message):
        engine.text.encode_prompt(prompt)


def test_a_prompt_beyond_the_context_is_refused(engine):
    with pytest.raises(PromptTooLong, match=r"maximum context length is 40 tokens\. However, you requested 40"):
        request(engine, "a" * 40, max_tokens=None)
    with pytest.raises(PromptTooLong, match="38 in the prompt and 3 to generate"):
        request(engine, "a" * 38, max_tokens=3)
    assert request(engine, "a" * 38, max_tokens=None).sampling.max_tokens == 2


def test_more_samples_than_rows_are_refused(engine):
    with pytest.raises(InvalidRequest, match="n is 5, at most 4"):
        request(engine, "a", n=5)


def test_a_model_without_a_template_refuses_chats(engine):
    with pytest.raises(InvalidRequest, match="no chat template"):
        engine.text.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("delta", ["d", "e", "f"]), ("cumulative", ["d", "de", "def"]), ("final", ["def"])],
)
def test_the_output_kind_says_what_is_yielded(engine, kind, expected):
    async def texts() -> list[str]:
        own = request(engine, "abc", max_tokens=3, output_kind=kind)
        async with aclosing(engine.generate(own)) as stream:
            return [delta.text async for deltas in stream for delta in deltas]

    assert asyncio.run(texts()) == expected


def warming(engine: AsyncEngine, prompt: str, request_id: str, *, pin: bool = False, salt: bytes = b""):
    ids = engine.text.encode_prompt(prompt)
    return warm_request(engine.text, ids, request_id=request_id, pin=pin, salt=salt)


def test_prompts_are_warmed_and_pinned_and_say_what_was_there(engine):
    async def main():
        first = await engine.warm(warming(engine, "abcdefghij", "w"))
        assert (first.cached, first.num_warm_tokens) == (CachedTokens(), 8)
        again = await engine.warm(warming(engine, "abcdefghij", "w"))
        assert again.cached == CachedTokens(full=8, partial=1)
        pin = await engine.pin(warming(engine, "abcdefgx", "p", pin=True, salt=b"s"))
        assert pin == Pin("p", num_tokens=8, num_blocks=2)
        assert (await engine.pins(), await engine.pins(b"s"), await engine.pins(b"")) == ([pin], [pin], [])
        with pytest.raises(UnknownPin):
            await engine.unpin("p", b"other")
        await engine.unpin("p", b"s")
        await engine.pin(warming(engine, "abcdefgx", "q", pin=True))
        await engine.reset_prefix_cache()
        assert await engine.pins() == []

    asyncio.run(main())
    assert engine.stats().cache.num_used == 0


def test_a_pin_over_the_limit_is_refused_and_the_engine_lives(engine):
    async def main():
        await engine.pin(warming(engine, "abcdefghijklmnop", "p", pin=True))
        with pytest.raises(PinLimitReached, match="takes 3 blocks, pins hold 4 and may hold 6"):
            await engine.pin(warming(engine, "abcdefghijkl", "q", pin=True))
        with pytest.raises(InvalidRequest, match="3 tokens"):
            await engine.pin(warming(engine, "abc", "r", pin=True))
        assert [pin.pin_id for pin in await engine.pins()] == ["p"]

    asyncio.run(main())


def test_a_pin_whose_caller_leaves_is_dropped_wherever_it_stands(engine, gate):
    async def main():
        gate.allow_only(1)  # of the two steps that the prompt takes
        task = asyncio.create_task(engine.pin(warming(engine, "abcdefghijklmnopqrstuvwx", "p", pin=True)))
        while not engine.stats().num_steps:
            await asyncio.sleep(0.001)
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await engine.pins() == []
        await engine.pin(warming(engine, "abcdefghijklmnopqrstuvwx", "q", pin=True))  # the room is free again

    asyncio.run(main())
    assert engine.stats().cache.num_pinned == 6


def test_a_dead_engine_says_so_when_asked_for_pins(engine):
    engine.close()

    async def main():
        with pytest.raises(EngineDead):
            await engine.pin(warming(engine, "abcdefgh", "p", pin=True))
        with pytest.raises(EngineDead):
            await engine.pins()

    asyncio.run(main())


# -- asleep and awake ------------------------------------------------------------------------------------------------


def test_an_engine_sleeps_refuses_requests_and_wakes(engine, host):
    async def go():
        before = await text_of(engine, "abcdefgh")
        report = await engine.sleep()
        assert (report.sleep_level, report.freed_bytes, engine.sleep_level) == (1, 1100, 1)
        assert (host.weights, host.has_cache) == (None, False)
        engine.check_health()
        with pytest.raises(EngineAsleep, match="wake_up"):
            engine.check_ready()
        with pytest.raises(EngineAsleep, match=r"level 1, without its weights and kv_cache.*wake_up"):
            await text_of(engine, "abc")
        woken = await engine.wake_up()
        assert (woken.sleep_level, woken.freed_bytes) == (0, -1100)
        engine.check_ready()
        assert await text_of(engine, "abcdefgh") == before
        assert engine.stats().num_cached_prompt_tokens == 0

    asyncio.run(go())


def test_parts_wake_one_after_the_other(engine, host):
    async def go():
        await engine.sleep(2)
        assert (await engine.wake_up(["weights"])).sleep_level == 2
        with pytest.raises(EngineAsleep, match="without its kv_cache"):
            engine.check_ready()
        assert host.weights is not None
        assert (await engine.wake_up(["kv_cache", "weights"])).sleep_level == 0
        assert (await engine.wake_up()).freed_bytes == 0
        with pytest.raises(InvalidRequest, match="tags are weights and kv_cache, got 'memory'"):
            await engine.wake_up(["memory"])

    asyncio.run(go())


def test_level_1_promises_the_same_files_and_level_2_takes_others(engine, host):
    async def go():
        await engine.sleep(1)
        host.files[None] = b"others"
        with pytest.raises(IncompatibleWeights):
            await engine.wake_up()
        assert engine.sleep_level == 1
        await engine.sleep(2)
        assert (await engine.wake_up()).weights_digest == b"others".hex()
        assert engine.info.weights_digest == b"others".hex()

    asyncio.run(go())


@pytest.mark.parametrize(("level", "mode"), [(0, None), (3, None), (1, "keep")])
def test_unknown_levels_and_modes_are_refused(engine, level, mode):
    with pytest.raises(InvalidRequest, match="must be"):
        asyncio.run(engine.sleep(level, mode))
    engine.check_ready()


def test_requests_that_run_are_not_disturbed_unless_asked(engine, gate):
    async def go():
        gate.allow_only(1)
        running = asyncio.create_task(text_of(engine, "abc"))
        await until(lambda: engine.stats().num_running == 1)
        for operation in (engine.sleep(), engine.update_weights_from_disk("new.gguf")):
            refused = await asked_between_steps(gate, operation)
            with pytest.raises(EngineInUse, match="1 sequences run and 0 wait"):
                await refused
        gate.open()
        assert await running == "defgh"

    asyncio.run(go())


def test_wait_lets_requests_end_and_takes_no_more(engine, gate):
    async def go():
        gate.allow_only(1)
        running = asyncio.create_task(text_of(engine, "abc"))
        await until(lambda: engine.stats().num_running == 1)
        asleep = await asked_between_steps(gate, engine.sleep(mode="wait"))
        await until(lambda: not is_ready(engine))
        late = await asked_between_steps(gate, text_of(engine, "abc", "late"))
        with pytest.raises(EngineAsleep, match="is being put to sleep"):
            await late
        refused = await asked_between_steps(gate, engine.sleep(mode="abort"))
        with pytest.raises(EngineInUse, match="is being put to sleep"):
            await refused
        gate.open()
        assert await running == "defgh"
        assert (await asleep).sleep_level == 1

    asyncio.run(go())


def test_abort_ends_requests_with_the_reason_and_frees_their_blocks(engine, gate):
    async def go():
        gate.allow_only(1)
        running = asyncio.create_task(text_of(engine, "abc"))
        await until(lambda: engine.stats().num_running == 1)
        asleep = await asked_between_steps(gate, engine.sleep(mode="abort"))
        await until(lambda: not is_ready(engine))
        gate.open()
        with pytest.raises(EngineAsleep, match="was ended because"):
            await running
        await asleep
        assert engine.stats().cache.num_used == 0

    asyncio.run(go())


def test_who_gives_up_waiting_lets_requests_in_again(engine, gate):
    async def go():
        gate.allow_only(1)
        running = asyncio.create_task(text_of(engine, "abc"))
        await until(lambda: engine.stats().num_running == 1)
        asleep = await asked_between_steps(gate, engine.sleep(mode="wait"))
        await until(lambda: not is_ready(engine))
        asleep.cancel()
        await asyncio.gather(asleep, return_exceptions=True)
        gate.open()
        await until(lambda: is_ready(engine))
        assert await running == "defgh"
        assert engine.sleep_level == 0

    asyncio.run(go())


def test_other_weights_serve_once_they_are_read_and_hit_nothing_that_was_cached(engine, host):
    async def go():
        await text_of(engine, "abcdefgh")
        await text_of(engine, "abcdefgh")
        assert (cached := engine.stats().num_cached_prompt_tokens) > 0
        host.reading = threading.Event()
        updating = asyncio.create_task(engine.update_weights_from_disk("new.gguf"))
        await until(lambda: not is_ready(engine))
        with pytest.raises(EngineAsleep, match="is taking other weights"):
            await text_of(engine, "abc")
        assert host.weights.digest == b"old"
        host.reading.set()
        assert (await updating).weights_digest == b"new".hex()
        assert host.weights.digest == b"new"
        await text_of(engine, "abcdefgh")
        assert engine.stats().num_cached_prompt_tokens == cached

    asyncio.run(go())


@pytest.mark.parametrize(("path", "error"), [("gone.gguf", ModelNotFound), ("foreign.gguf", IncompatibleWeights)])
def test_an_update_that_fails_leaves_the_old_weights_serving(engine, host, path, error):
    async def go():
        host.files["foreign.gguf"] = b"foreign"
        before = await text_of(engine, "abcdefgh")
        with pytest.raises(error):
            await engine.update_weights_from_disk(path)
        await until(lambda: is_ready(engine))
        assert (host.weights.digest, await text_of(engine, "abcdefgh")) == (b"old", before)
        assert engine.stats().num_cached_prompt_tokens > 0

    asyncio.run(go())


def test_kept_answers_outlive_a_sleep_by_their_tokens(engine):
    async def go():
        sampling = SamplingParams(temperature=0, max_tokens=5)
        await collect(engine, engine.text.make_request([0, 1, 2], sampling, request_id="kept", keep=True))
        await engine.sleep()
        await engine.wake_up()
        fork = await engine.fork(Branch("kept"), sampling, request_id="fork")
        assert (await collect(engine, fork))[0][0] == "ijklm"

    asyncio.run(go())


async def text_of(engine, prompt, request_id="r"):
    return (await collect(engine, request(engine, prompt, request_id)))[0][0]


async def asked_between_steps(gate, operation):
    """Begin an operation while a step is held up, then let one step through."""
    task = asyncio.create_task(operation)
    await asyncio.sleep(0)  # it asks
    gate.steps.release()
    return task


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def is_ready(engine):
    try:
        engine.check_ready()
    except EngineAsleep:
        return False
    return True
