"""An engine without a model, whose tokens are scripted, and an app around it."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, aclosing, nullcontext
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from octavo_engine.adapters.info import AdapterInfo
from octavo_engine.api import EngineInfo, EngineStats
from octavo_engine.errors import EngineAsleep, EngineInUse, PinLimitReached, RequestFailed, UnknownAdapter, UnknownPin
from octavo_engine.expert_stats import ExpertStats
from octavo_engine.overlap import GraphStats, OverlapStats
from octavo_engine.pins import Pin
from octavo_engine.preemption import PreemptionStats
from octavo_engine.standby import MemoryReport, SleepMode
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.text.assemble import make_assembler
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer, TokenizerRules
from octavo_engine.timeline import RequestTimeline
from octavo_engine.types import (
    CachedTokens,
    CompletionDelta,
    EmbeddingOutput,
    FinishReason,
    Request,
    RequestTimes,
    SequenceUpdate,
    TokenLogprobs,
    WarmOutput,
)
from octavo_kvcache import CacheStats, HostCounts, LookupCounts
from octavo_server import ServerSettings, create_app
from octavo_server.serving import listen, make_server

EOS, BOS = 256, 257
VOCAB_SIZE = 258
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
INFO = EngineInfo(
    model_name="org/fake-model",
    architecture="fake",
    dtype="float32",
    kv_dtype="float32",
    mode="exact",
    device="cpu",
    kernel_backend="reference",
    deterministic=True,
    vocab_size=VOCAB_SIZE,
    max_model_len=200,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=100,
    kv_cache_bytes=1 << 20,
    kv_cache_reason="a test asked for it",
    num_parameters=1000,
    load_seconds=0.5,
)
CACHE = CacheStats(
    num_blocks=101,
    block_size=16,
    num_sequences=0,
    num_free=75,
    num_used=25,
    num_cached=10,
    num_shared=5,
    num_parked=0,
    num_pins=2,
    num_pinned=7,
    num_table_blocks=50,
    num_live_tokens=390,
    lookups=LookupCounts(9, 640, 304, 16),
    resumed_lookups=LookupCounts(2, 100, 48, 3),
    num_deduplicated=4,
    num_copies=3,
    num_evictions=2,
    host=HostCounts(num_blocks=21, num_used=5, num_blocks_out=12, num_blocks_in=11),
)


class ByteBackend:
    """A vocabulary of the 256 bytes and two special tokens."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self._special = {EOS: "<eos>", BOS: "<bos>"}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token(self, token_id: int) -> str | None:
        return self._special.get(token_id, chr(token_id))

    def token_id(self, token: str) -> int | None:
        return next((i for i, t in self._special.items() if t == token), ord(token[0]))


def byte_tokenizer() -> Tokenizer:
    rules = TokenizerRules(
        bytes_of=lambda token: token.encode("latin-1"),
        strip_leading_space=False,
        special_token_ids=frozenset({EOS, BOS}),
        special_tokens={"eos_token": "<eos>", "bos_token": "<bos>"},
    )
    return Tokenizer(ByteBackend(), rules)


class FakeEngine:
    """An `EngineClient` that answers every request with `replies`, by the choice's index, one byte a token.

    Attributes a test may set: `replies`; `step` (tokens per delta); `hold_after` (tokens after which a request waits
    for ever); `fail_after` (tokens after which it fails); `broken` (what check_health and every request raise).
    """

    def __init__(self) -> None:
        self.info = INFO
        tokenizer = byte_tokenizer()
        self.text = TextProcessor(
            tokenizer,
            ChatTemplate(TEMPLATE, {}),
            max_model_len=INFO.max_model_len,
            max_num_seqs=INFO.max_num_seqs,
            vocab_size=VOCAB_SIZE,
            grammars=GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS]),
        )
        self.replies: list[str | bytes] = [" Paris."]
        self.step = 1
        self.hold_after: int | None = None
        self.fail_after: int | None = None
        self.num_cached_tokens = 0
        self.pinned: dict[str, tuple[Pin, bytes]] = {}
        self.broken: Exception | None = None
        self.timelines: dict[str, RequestTimeline] = {}
        self.sleep_level = 0
        self.asked: list[tuple[Any, ...]] = []  # of an administrator
        self.unreadable: dict[str, Exception] = {}  # by the path of weights
        self.served_adapters: dict[str, AdapterInfo] = {}
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.num_running = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.closed = False
        self.holding = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    def check_health(self) -> None:
        if self.broken is not None:
            raise self.broken

    def check_ready(self) -> None:
        self.check_health()
        if self.sleep_level:
            raise EngineAsleep(f"the engine sleeps (level {self.sleep_level}); wake it by POST /wake_up")

    async def sleep(self, level: int = 1, mode: SleepMode | None = None) -> MemoryReport:
        if self.num_running and mode is None:
            raise EngineInUse(f"{self.num_running} sequences run and 0 wait")
        self.asked.append(("sleep", level, mode))
        self.sleep_level = level
        return self._report(1000, 400)

    async def wake_up(self, tags: list[str] | None = None) -> MemoryReport:
        self.asked.append(("wake_up", tags))
        self.sleep_level = 0
        return self._report(400, 1000)

    async def update_weights_from_disk(self, path: str, mode: SleepMode | None = None) -> MemoryReport:
        self.asked.append(("update", path, mode))
        if path in self.unreadable:
            raise self.unreadable[path]
        self.info = replace(self.info, weights_digest=path)
        return self._report(1000, 1000)

    def _report(self, before: int, after: int) -> MemoryReport:
        return MemoryReport(
            sleep_level=self.sleep_level,
            weights_digest=self.info.weights_digest,
            bytes_before=before,
            bytes_after=after,
            seconds=0.5,
        )

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        self.asked.append(("load", name, path, in_place))
        if path in self.unreadable:
            raise self.unreadable[path]
        info = AdapterInfo(name=name, path=path, digest="ab", rank=16, num_bytes=1024)
        self.served_adapters[name] = info
        return info

    async def unload_adapter(self, name: str) -> None:
        if self.served_adapters.pop(name, None) is None:
            raise UnknownAdapter(f"no adapter {name!r} is served; none is")

    def adapters(self) -> list[AdapterInfo]:
        return list(self.served_adapters.values())

    async def release(self, request_id: str) -> bool:
        self.check_health()
        return False

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        return self.timelines.get(request_id)

    async def run(self, request: Request, take: Callable[[list[CompletionDelta]], None]) -> None:
        async with aclosing(self.generate(request)) as batches:
            async for batch in batches:
                take(batch)

    async def generate(self, request: Request) -> AsyncGenerator[list[CompletionDelta]]:
        self.check_ready()
        self.requests.append(request)
        self.num_running += 1
        stream = self.text.stream(request)
        scripts = [self._script(request, index) for index in range(request.sampling.num_sequences)]
        assembler = make_assembler(request.sampling)
        num_done = 0
        try:
            while not stream.finished:
                await asyncio.sleep(0)
                if self.fail_after is not None and num_done >= self.fail_after:
                    raise RequestFailed("cannot open /secret/path/model.bin")
                if self.hold_after is not None and num_done >= self.hold_after:
                    self.loop = asyncio.get_running_loop()
                    self.holding.set()
                    await asyncio.Event().wait()
                updates = [
                    self._update(
                        request, i, s[num_done : num_done + self.step], num_done, len(s) <= num_done + self.step
                    )
                    for i, s in enumerate(scripts)
                    if num_done < len(s)
                ]
                num_done += self.step
                deltas = [delta for update in updates if (delta := stream.push(update)) is not None]
                self.num_generation_tokens += sum(len(delta.token_ids) for delta in deltas)
                yield deltas if assembler is None else assembler.take(deltas)
            self.num_prompt_tokens += len(request.prompt_token_ids)
        finally:
            self.num_running -= 1
            if not stream.finished:
                self.aborted.append(request.request_id)

    def _script(self, request: Request, index: int) -> list[int]:
        reply = self.replies[index % len(self.replies)]
        tokens = [*(reply.encode() if isinstance(reply, str) else reply), EOS]
        return tokens[: request.sampling.max_tokens]

    def _update(self, request: Request, index: int, tokens: list[int], done: int, last: bool) -> SequenceUpdate:
        reason = None
        if last:
            reason = FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH
        logprobs = None
        if request.sampling.wants_logprobs:
            logprobs = tuple(token_logprobs(token, request.sampling.logprobs or 0, index) for token in tokens)
        of_prompt, prompt_logprobs = request.sampling.prompt_logprobs, None
        if of_prompt is not None and index == done == 0:
            prompt_logprobs = tuple(token_logprobs(token, of_prompt) for token in request.prompt_token_ids[1:])
        arrival = request.arrival_time
        return SequenceUpdate(
            request_id=request.request_id,
            index=index,
            token_ids=tuple(tokens),
            logprobs=logprobs,
            finish_reason=reason,
            cached=CachedTokens(full=self.num_cached_tokens),
            times=RequestTimes(arrival, arrival + 0.25, arrival + 0.5, arrival + 1.0) if last else None,
            prompt_logprobs=prompt_logprobs,
        )

    async def embed(self, request: Request) -> EmbeddingOutput:
        self.check_ready()
        self.requests.append(request)
        self.num_running += 1
        try:
            if self.hold_after is not None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        finally:
            self.num_running -= 1
        return EmbeddingOutput(
            request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, embedding=[0.6, -0.8]
        )

    async def warm(self, request: Request) -> WarmOutput:
        await self.embed(request)
        prompt = request.prompt_token_ids
        num_warm_tokens = len(prompt) // self.info.block_size * self.info.block_size
        return WarmOutput(
            prompt_token_ids=prompt, cached=CachedTokens(full=self.num_cached_tokens), num_warm_tokens=num_warm_tokens
        )

    async def pin(self, request: Request) -> Pin:
        num_blocks = len(request.prompt_token_ids) // self.info.block_size
        if num_blocks > 8:
            raise PinLimitReached(f"a prompt takes {num_blocks} blocks, pins may hold 8")
        await self.embed(request)
        pin = Pin(request.request_id, num_blocks * self.info.block_size, num_blocks)
        self.pinned[request.request_id] = pin, request.salt
        return pin

    async def unpin(self, pin_id: str, salt: bytes | None = None) -> None:
        if self.pinned.get(pin_id, (None, None))[1] != salt:
            raise UnknownPin(f"no pin has the id {pin_id!r}")
        del self.pinned[pin_id]

    async def pins(self, salt: bytes | None = None) -> list[Pin]:
        return [pin for pin, own in self.pinned.values() if own == salt]

    async def reset_prefix_cache(self) -> None:
        self.asked.append(("reset_prefix_cache",))
        self.pinned.clear()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            num_waiting=0,
            num_steps=7,
            num_preemptions=1,
            num_prompt_tokens=self.num_prompt_tokens,
            cached_prompt_tokens=CachedTokens(full=self.num_cached_tokens),
            num_generation_tokens=self.num_generation_tokens,
            mean_waste=0.025,
            cache=CACHE,
            preemption=PreemptionStats(num_recomputed=3, num_swapped=4),
            num_held_up={"blocks": 6},
            overlap=OverlapStats(5, {"rules": 2}, GraphStats(3, 4, {"prompt": 1})),
            experts=ExpertStats(((6, 2), (4, 4))),
            fallbacks={"paged_attention": 2},
        )

    def close(self) -> None:
        self.closed = True


def token_logprobs(token: int, num_top: int, bonus: int = 0) -> TokenLogprobs:
    """The token itself at -0.5, then its successors at -1.5, -2.5, ...; minus infinity in the fifth place.

    A higher `bonus`, up to 9, makes the token itself a little likelier.
    """
    top = tuple(((token + i) % 256, float("-inf") if i == 4 else -0.5 - i) for i in range(num_top))
    return TokenLogprobs(token, -0.5 + bonus / 20, 1, top)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine)) as client:
        yield client


@pytest.fixture
def make_client() -> Iterator[Callable[..., TestClient]]:
    """Make a client of an app with settings."""
    with ExitStack() as stack:
        yield lambda engine, **settings: stack.enter_context(
            TestClient(create_app(engine, ServerSettings(**settings)), raise_server_exceptions=False)
        )


@pytest.fixture
def stream(client: TestClient) -> Callable[..., list[Any]]:
    """Post a body with stream true; return the events' JSON, the end mark as a string."""

    def post(path: str, **body: Any) -> list[Any]:
        response = client.post(path, json={"stream": True, **body})
        assert response.status_code == 200, response.text
        return parse_events(response.text)

    return post


def parse_events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    events = []
    for event in text[:-2].split("\n\n"):
        assert event.startswith("data: "), event
        assert "\n" not in event
        data = event.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Run an app by uvicorn on a loopback port in a thread; return its base URL."""
    with ExitStack() as stack:

        def start(engine: FakeEngine, **settings: Any) -> str:
            listening = stack.enter_context(listen("127.0.0.1", 0))
            server = make_server(create_app(engine, ServerSettings(**settings)))
            server.capture_signals = nullcontext  # a thread cannot take signals
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()

            def stop() -> None:
                server.should_exit = server.force_exit = True
                thread.join(10)

            stack.callback(stop)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for something that another thread brings about; fail after five seconds."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "it did not happen within five seconds"
            threading.Event().wait(0.005)

    return wait
