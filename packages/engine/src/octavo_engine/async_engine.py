"""The engine for asyncio: one thread runs the step loop, callers await their own queues."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from octavo_engine.adapters.info import AdapterInfo
from octavo_engine.api import EngineInfo, EngineStats
from octavo_engine.async_adapters import AsyncAdapters
from octavo_engine.async_commands import AsyncCommands
from octavo_engine.async_standby import AsyncStandby
from octavo_engine.branch import Branch, Parent
from octavo_engine.engine import Engine
from octavo_engine.errors import (
    EngineAsleep,
    EngineDead,
    InvalidRequest,
    RequestFailed,
    WorkerLost,
    request_error,
)
from octavo_engine.mailbox import Letter, Mailbox, Reader, post
from octavo_engine.pins import Pin
from octavo_engine.relay import Relay
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.standby import MemoryReport, SleepMode
from octavo_engine.stats import collect_stats
from octavo_engine.text.answer import AnswerText
from octavo_engine.text.processor import TextProcessor
from octavo_engine.timeline import RequestTimeline
from octavo_engine.types import CompletionDelta, EmbeddingOutput, FinishReason, Request, SequenceUpdate, WarmOutput
from octavo_engine.warming import warm_output
from octavo_engine.watchdog import Watchdog

if TYPE_CHECKING:
    from octavo_engine.config import EngineConfig
    from octavo_engine.weights.load import Progress

R = TypeVar("R", bound=Reader)
_log = logging.getLogger(__name__)


class AsyncEngine:
    """An `EngineClient` in this process. The thread owns the engine; callers only pass commands to it.

    A request is aborted when its reader stops reading: closing the iterator, or cancelling the task, is enough.

    Args:
        engine: does the work.
        text: the model's text side.
        info: what is served.
        watchdog_timeout: seconds without a step, though there is work, after which it is unhealthy; None never is.
    """

    def __init__(
        self, engine: Engine, text: TextProcessor, info: EngineInfo, watchdog_timeout: float | None = None
    ) -> None:
        self._engine = engine
        self._text = text
        self._info = info
        self._readers: dict[str, Reader] = {}
        self._commands = AsyncCommands(self.check_health)
        self._waiting_for_idle: list[Future[None]] = []
        self._standby = AsyncStandby(engine.standby, self._commands.ask, self._commands.do, self._idle, self._abort_all)
        self._adapters = AsyncAdapters(engine, self._commands.ask)
        self._dead: EngineDead | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()
        self._watchdog: Watchdog | None = None
        if watchdog_timeout is not None:
            self._watchdog = Watchdog(self._progress, watchdog_timeout)
            self._watchdog.start()

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> AsyncEngine:
        """Load a model and start its engine; see `EngineConfig` for what can be chosen."""
        from octavo_engine.build import build_engine

        built = build_engine(config, progress=progress)
        return cls(built.engine, built.text, built.info, config.watchdog_timeout)

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        return self._info

    @property
    def text(self) -> TextProcessor:
        """The model's text side."""
        return self._text

    async def generate(self, request: Request) -> AsyncGenerator[list[CompletionDelta]]:
        """Run a request; yield what is new as it comes. See `EngineClient.generate`."""
        answer = self._answer_text(request)
        async with self._submitted(request, Mailbox(asyncio.get_running_loop())) as mailbox:
            while not answer.finished:
                if deltas := answer.push(await mailbox.take()):
                    yield deltas

    async def run(self, request: Request, take: Callable[[list[CompletionDelta]], None]) -> None:
        """Run a request to its end; `take` is given what is new as it comes. See `EngineClient.run`."""
        loop = asyncio.get_running_loop()
        relay = Relay(loop, self._answer_text(request), take, loop.create_future())
        async with self._submitted(request, relay):
            await relay.ended

    def _answer_text(self, request: Request) -> AnswerText:
        return AnswerText(self._text, request, lambda index: self._abort(request.request_id, index))

    async def embed(self, request: Request) -> EmbeddingOutput:
        """Run a request with task `embed`."""
        update = await self._pooled(request)
        assert update.pooled is not None
        return EmbeddingOutput(
            request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, embedding=list(update.pooled)
        )

    async def _pooled(self, request: Request) -> SequenceUpdate:
        """Run a request with task `embed` to its end; return the update that has the vector."""
        async with self._submitted(request, Mailbox(asyncio.get_running_loop())) as mailbox:
            while True:
                for update in await mailbox.take():
                    if update.pooled is not None:
                        return update
                    if update.finish_reason is not None:
                        raise request_error(update.error, f"the request ended: {update.finish_reason}")

    async def warm(self, request: Request) -> WarmOutput:
        """Compute a prompt into the prefix cache. See `EngineClient.warm`."""
        await self._commands.ask(lambda: self._engine.pins.prepare(request))
        return warm_output(request, await self._pooled(request), self._info.block_size)

    async def pin(self, request: Request) -> Pin:
        """Compute a prompt into the prefix cache and hold it there. See `EngineClient.pin`."""
        pins, pin_id = self._engine.pins, request.request_id
        try:
            await self._commands.ask(lambda: pins.prepare(request))
            await self._pooled(request)
            return await self._commands.ask(lambda: pins.get(pin_id))
        except InvalidRequest:
            raise  # nothing was set aside
        except BaseException:
            self._commands.do(lambda: pins.cancel(pin_id))  # nobody will know its id
            raise

    async def unpin(self, pin_id: str, salt: bytes | None = None) -> None:
        """Let go of a pin. See `EngineClient.unpin`."""
        await self._commands.ask(lambda: self._engine.pins.drop(pin_id, salt))

    async def pins(self, salt: bytes | None = None) -> list[Pin]:
        """Return the pins of one salt, or of all. See `EngineClient.pins`."""
        return await self._commands.ask(lambda: self._engine.pins.listed(salt))

    async def reset_prefix_cache(self) -> None:
        """Forget all cached content and drop all pins. See `EngineClient.reset_prefix_cache`."""
        await self._commands.ask(self._engine.pins.reset)

    async def branch_tokens(self, branch: Branch, salt: bytes = b"") -> list[int]:
        """Return the tokens that a branch begins with. See `EngineClient.branch_tokens`."""
        token_ids = await self._commands.ask(lambda: self._engine.branch_tokens(branch, salt))
        return token_ids + self._text.encode_continuation(branch.continuation)

    async def fork(
        self,
        branch: Branch,
        sampling: SamplingParams,
        *,
        request_id: str,
        keep: bool = False,
        salt: bytes = b"",
        adapter: str | None = None,
    ) -> Request:
        """Make a request that goes on from a token of a running or kept one; `generate` runs it.

        Raises:
            InvalidRequest: if the parent neither runs nor is kept, has fewer tokens, or a parameter cannot be run.
        """
        token_ids = await self.branch_tokens(branch, salt)
        parent = Parent(branch.request_id, branch.index)
        return self._text.make_request(
            token_ids, sampling, request_id=request_id, parent=parent, keep=keep, salt=salt, adapter=adapter
        )

    async def release(self, request_id: str) -> bool:
        """Drop what is kept of an ended request. See `EngineClient.release`."""
        return await self._commands.ask(lambda: self._engine.release(request_id))

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        """Return what has happened to a request. See `EngineClient.timeline`."""
        return await self._commands.ask(lambda: self._engine.scheduler.timeline(request_id))

    async def sleep(self, level: int = 1, mode: SleepMode | None = None) -> MemoryReport:
        """Let go of the weights and the KV cache. See `EngineClient.sleep`."""
        return await self._standby.sleep(level, mode)

    async def wake_up(self, tags: Sequence[str] | None = None) -> MemoryReport:
        """Take the model into memory again. See `EngineClient.wake_up`."""
        return self._changed(await self._standby.wake_up(tags))

    async def update_weights_from_disk(self, path: str, mode: SleepMode | None = None) -> MemoryReport:
        """Serve the weights of other files from now on. See `EngineClient.update_weights_from_disk`."""
        return self._changed(await self._standby.update_weights(path, mode))

    def _changed(self, report: MemoryReport) -> MemoryReport:
        """Take note that there may be other weights."""
        self._info = replace(self._info, weights_digest=report.weights_digest)
        return report

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Read an adapter and serve it under a name. See `EngineClient.load_adapter`."""
        return await self._adapters.load(name, path, in_place=in_place)

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more. See `EngineClient.unload_adapter`."""
        await self._adapters.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """Return the adapters that are served. See `EngineClient.adapters`."""
        return self._adapters.listed()

    @property
    def sleep_level(self) -> int:
        """How deep the engine sleeps; 0 is awake."""
        return self._engine.standby.level

    def stats(self) -> EngineStats:
        """Return the present figures; read without stopping the loop, each one exact for some recent step."""
        engine = self._engine
        return collect_stats(engine.scheduler, engine.adapter_stats, engine.overlap_stats, engine.expert_stats)

    def check_health(self) -> None:
        """Return if the loop runs; raise EngineDead or EngineStuck with the reason if not."""
        if self._dead is not None:
            raise self._dead
        try:
            self._engine.check_ranks()
        except WorkerLost as error:
            raise EngineDead(f"the engine cannot go on: {error}") from error
        if self._watchdog is not None:
            self._watchdog.check()

    def check_ready(self) -> None:
        """Return if requests are taken. See `EngineClient.check_ready`."""
        self.check_health()
        self._engine.standby.check()

    def close(self) -> None:
        """Stop the loop, abort what runs, and release the model; waits for the step in progress."""
        self._commands.close()
        self._thread.join()
        if self._watchdog is not None:
            self._watchdog.close()

    @contextlib.asynccontextmanager
    async def _submitted(self, request: Request, reader: R) -> AsyncIterator[R]:
        """Run a request, whose updates a reader gets; it is aborted if it has not ended at the end of the block."""
        self.check_health()
        if request.adapter is not None:
            await self._adapters.prepare(request.adapter)
        request_id = request.request_id
        if request_id in self._readers:
            raise RequestFailed(f"request id {request_id!r} is in use; ids must be unique among running requests")
        self._readers[request_id] = reader
        try:
            self.check_health()  # again: a loop that ended before the reader stood there cannot have told it
            self._commands.do(lambda: self._add(request, reader))
            yield reader
        finally:
            del self._readers[request_id]
            self._abort(request_id, None)  # unknown to the engine if it has ended

    def _add(self, request: Request, reader: Reader) -> None:
        """Queue a request, in the engine's thread; its reader is told if it is refused."""
        try:
            self._engine.add(request)
        except (EngineAsleep, InvalidRequest) as error:
            post(reader.loop, [(reader, error)])

    def _abort(self, request_id: str, index: int | None) -> None:
        self._commands.put(lambda: self._engine.abort(request_id, index))

    async def _idle(self) -> None:
        """Wait until no request runs or waits."""
        answer: Future[None] = Future()

        def note() -> list[SequenceUpdate]:
            self._waiting_for_idle.append(answer)
            return []

        await self._commands.answered(answer, note)

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._commands.wait(lambda: self._engine.has_work):
                updates = [u for command in self._commands.take() for u in command()]
                if self._engine.has_work:
                    updates += self._engine.step()
                self._deliver(updates)
                if self._waiting_for_idle and not self._engine.has_work:
                    self._tell_idle()
        except Exception as error:  # the loop itself broke: nothing can be served any more, and everyone is told
            _log.exception("the engine loop stopped")
            self._dead = EngineDead(f"the engine stopped: {type(error).__name__}: {error}")
        self._dead = self._dead or EngineDead("the engine was closed")
        for reader in list(self._readers.values()):
            post(reader.loop, [(reader, self._dead)])
        self._commands.fail(self._dead)
        self._engine.close()

    def _progress(self) -> int | None:
        """Return a number that changes with each step; None while there is nothing to do."""
        if self._dead is not None or not (self._commands or self._engine.has_work):
            return None
        return self._engine.scheduler.counters.num_steps

    def _tell_idle(self) -> None:
        for answer in self._waiting_for_idle:
            if answer.set_running_or_notify_cancel():
                answer.set_result(None)
        self._waiting_for_idle.clear()

    def _abort_all(self) -> None:
        """End all requests, in the engine's thread, and tell their readers why."""
        error = EngineAsleep("the request was ended because the engine was put to sleep or given other weights")
        for request_id in self._engine.scheduler.request_ids:
            self._engine.abort(request_id)
            if (reader := self._readers.get(request_id)) is not None:
                post(reader.loop, [(reader, error)])

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        """Hand a step's updates over, in one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
        for update in updates:
            reader = self._readers.get(update.request_id)
            if reader is None or update.finish_reason is FinishReason.ABORT:
                continue  # whoever aborted does not wait for an answer
            by_loop.setdefault(reader.loop, []).append((reader, update))
        for loop, letters in by_loop.items():
            post(loop, letters)
