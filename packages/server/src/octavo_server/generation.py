"""One HTTP request's share of the engine: its requests side by side, its choices numbered through, its usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from octavo_engine.api import EngineClient
from octavo_engine.errors import RequestFailed
from octavo_engine.types import CompletionDelta, FinishReason, Request, Tenant, TokenLogprobs
from octavo_server.admission import Ticket
from octavo_server.exchange import current_exchange
from octavo_server.metrics import Metrics, RequestTrack

WIRE_REASONS = (FinishReason.STOP, FinishReason.LENGTH)

ChoiceDeltas = list[tuple[int, CompletionDelta]]
"""(number of the choice in the HTTP answer, what is new in it)"""

Take = Callable[[ChoiceDeltas], None]

T = TypeVar("T")


class Generation:
    """Runs the requests of one HTTP request at the same time.

    Args:
        engine: runs them.
        metrics: is told of each request.
        requests: one per prompt, all with the same `n`.
        ticket: lets the requests in; it is given back when they have ended.
        prompt_only: generate nothing: every choice ends at once, empty, for its length. The requests run if their
            prompts' log-probabilities are wanted.

    Raises:
        ApiError: 429 if the limits of the caller's key leave no room for the prompts.

    Attributes:
        prompt_logprobs: by prompt, of its tokens from the second on, once they are known.
    """

    def __init__(
        self,
        engine: EngineClient,
        metrics: Metrics,
        requests: Sequence[Request],
        ticket: Ticket,
        *,
        prompt_only: bool = False,
    ) -> None:
        requests = claim(requests)
        self._ticket = ticket
        self._engine = engine
        self._metrics = metrics
        self._requests = requests
        self._prompt_only = prompt_only
        self._n = requests[0].sampling.n
        self._num_tokens = [0] * (self._n * len(requests))
        self._num_cached_tokens = [0] * len(requests)
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.prompt_logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(requests)

    @property
    def num_choices(self) -> int:
        """Choices over all prompts; those of prompt i are numbered from i x n."""
        return len(self._num_tokens)

    def usage(self) -> dict[str, Any]:
        """Return the tokens used so far; a prompt counts once, however many choices it has."""
        num_generated = sum(self._num_tokens)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens)},
        }

    async def run(self, take: Take) -> None:
        """Run the requests to their ends; `take` is called with what is new as it comes. Cancelling aborts them.

        Raises:
            RequestFailed: if the engine could not compute one of them; the others are aborted.
            EngineDead: if the engine has stopped.
            Exception: what `take` raised; all are aborted.
        """
        with self._ticket:
            if self._prompt_only and self._requests[0].sampling.prompt_logprobs is None:
                take([(choice, _empty(choice)) for choice in range(self.num_choices)])
            elif len(self._requests) == 1:
                await self._run(0, take)
            else:
                await self._run_all(take)

    async def deltas(self) -> AsyncGenerator[ChoiceDeltas, None]:
        """Run the requests and yield what is new, for those who wait in between; the same errors as `run`."""
        queue: asyncio.Queue[ChoiceDeltas | None] = asyncio.Queue()
        work = asyncio.create_task(self.run(queue.put_nowait))
        work.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (deltas := await queue.get()) is not None:
                yield deltas
            work.result()
        finally:
            await cancel_all([work])

    async def _run_all(self, take: Take) -> None:
        tasks = [asyncio.create_task(self._run(place, take)) for place in range(len(self._requests))]
        try:
            for task in asyncio.as_completed(tasks):
                await task
        finally:
            await cancel_all(tasks)

    async def _run(self, place: int, take: Take) -> None:
        request = self._requests[place]
        with self._metrics.track(request) as track:
            # Every token of every stream passes here.
            await self._engine.run(request, lambda batch: take(self._observed(place, batch, track)))

    def _observed(self, place: int, batch: list[CompletionDelta], track: RequestTrack) -> ChoiceDeltas:
        """Count what came of one request; return it with the numbers of its choices."""
        first_choice = place * self._n
        now = time.monotonic()
        if self._prompt_only:
            batch = [_without_tokens(delta) for delta in batch]
        observed = []
        for delta in batch:
            if delta.finish_reason is not None:
                _check_reason(delta.finish_reason)
            track.observe(delta, now)
            if delta.prompt_logprobs:
                self.prompt_logprobs[place] = delta.prompt_logprobs
            choice = first_choice + delta.index
            self._num_tokens[choice] = delta.num_tokens
            self._num_cached_tokens[place] = max(self._num_cached_tokens[place], delta.cached.total)
            observed.append((choice, delta))
        return observed


def claim(requests: Sequence[Request]) -> Sequence[Request]:
    """Return requests in the name of the caller's key, whose limits they are taken from.

    Raises:
        ApiError: 429 if the limits leave no room for their prompts.
    """
    exchange = current_exchange()
    if exchange is None or exchange.key is None:
        return requests
    if exchange.budget is not None:
        exchange.budget.take_prompts(sum(len(request.prompt_token_ids) for request in requests))
    tenant = Tenant(exchange.key.name, exchange.key.share)
    return [replace(request, tenant=tenant) for request in requests]


async def until_disconnect(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a client who waits for it; stop at once if the client leaves.

    Raises:
        ClientDisconnect: if the client left first; the work has been cancelled and has ended.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        await cancel_all([worker, watcher])


async def wait_for_disconnect(receive: Any) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended, whatever they end with."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _check_reason(reason: FinishReason) -> None:
    if reason not in WIRE_REASONS:
        raise RequestFailed(f"a choice ended with reason {reason}")


def _without_tokens(delta: CompletionDelta) -> CompletionDelta:
    ended = delta.finish_reason is not None
    return delta._replace(
        text="", token_ids=(), num_tokens=0, logprobs=(), finish_reason=FinishReason.LENGTH if ended else None
    )


def _empty(choice: int) -> CompletionDelta:
    return CompletionDelta(index=choice, text="", token_ids=(), num_tokens=0, finish_reason=FinishReason.LENGTH)
