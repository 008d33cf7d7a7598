"""BackgroundResponses: responses made without a client: they can be followed and cancelled, and outlive a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass

from octavo_engine.errors import InvalidRequest
from octavo_server.admission import Ticket
from octavo_server.errors import ApiError, to_api_error
from octavo_server.event_log import EventLog
from octavo_server.generation import cancel_all
from octavo_server.keys import ApiKey
from octavo_server.local_calls import own_exchange
from octavo_server.message_blocks import sse
from octavo_server.protocol.responses import ResponsesBody
from octavo_server.response_request import response_request
from octavo_server.response_run import ResponseRun
from octavo_server.state import ServerState
from octavo_server.store.database import StoreFailed
from octavo_server.store.responses import ResponseStore, StoredResponse

MAX_RUNS = 3
_STOPPED = "the server stopped before this response was complete; create it again"
_PAUSE_SECONDS = 1.0  # between attempts to be let in

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A response at work; without a log nobody was promised its events."""

    run: ResponseRun
    owner: str
    log: EventLog | None
    task: asyncio.Task[None] | None = None


class BackgroundResponses:
    """Makes responses as slots come free.

    A response whose events nobody was promised is made again after a restart, `MAX_RUNS` times at most, since it may
    be what stops the server. One that was being streamed has failed then: a second making might not tell the same.

    Args:
        state: of the app.
        responses: where they are stored.
        slots: those that they share with the lines of batches.
        keys: the API keys by the owners that they make.
    """

    def __init__(
        self, state: ServerState, responses: ResponseStore, slots: asyncio.Semaphore, keys: Mapping[str, ApiKey]
    ) -> None:
        self._keys = keys
        self._state = state
        self._responses = responses
        self._slots = slots
        self._jobs: dict[str, _Job] = {}

    @property
    def num_open(self) -> int:
        """Those that wait or run."""
        return len(self._jobs)

    def check_room(self) -> None:
        """Refuse a response if too many wait.

        Raises:
            ApiError: 503.
        """
        if len(self._jobs) >= self._state.settings.max_num_requests:
            message = f"{len(self._jobs)} background responses wait or run; try again later"
            raise ApiError(503, message, type="server_error", code="overloaded", headers={"retry-after": "5"})

    async def start(self, run: ResponseRun, owner: str, *, streams: bool) -> None:
        """Let a response that is stored be made; with `streams` its events are kept, the first ones at once."""
        response_id = run.response["id"]
        created = run.created()
        if streams and await self._responses.last_event(response_id) < 0:
            await self._responses.add_events(response_id, created)
        job = _Job(run, owner, EventLog(self._responses, response_id) if streams else None)
        self._jobs[response_id] = job
        # Not in the context of the request that asks for it, whose time and budget end with its own answer.
        job.task = asyncio.create_task(self._work(job), context=Context())

    async def cancel(self, response_id: str) -> None:
        """Cancel a response, if it is at work, and wait until it has ended."""
        job = self._jobs.get(response_id)
        if job is None or job.task is None:
            return
        await cancel_all([job.task])
        if not job.run.has_ended:
            event = await job.run.end("cancelled")
            if job.log is not None:
                job.log.append(event)
        await self._finish(job)

    async def follow(self, response_id: str, after: int) -> AsyncGenerator[bytes, None]:
        """Return the events of a response whose numbers are above `after`, those to come too."""
        while True:
            job = self._jobs.get(response_id)
            news = None if job is None or job.log is None else job.log.news
            for number, event in await self._responses.events(response_id, after):
                after = number
                yield event
            if news is None:
                return
            await news.wait()

    async def recover(self) -> None:
        """Take up what a server that stopped has left: begin it again, or say that it failed."""
        for stored in await self._responses.unfinished():
            if not stored.background or (stored.streams and stored.num_runs) or stored.num_runs >= MAX_RUNS:
                await self._fail(stored, "server_error", _STOPPED)
                continue
            try:
                await self._begin_again(stored)
            except (InvalidRequest, ApiError) as error:
                await self._fail(stored, "invalid_prompt", to_api_error(error).message)

    async def close(self) -> None:
        """Stop; the next server takes up what is at work."""
        await cancel_all([job.task for job in self._jobs.values() if job.task is not None])

    async def _begin_again(self, stored: StoredResponse) -> None:
        response = stored.response | {"status": "queued"}
        body = ResponsesBody.model_validate(stored.request)
        model = self._state.resolve_model(response["model"])
        items = await self._responses.inputs(response["id"], stored.owner)
        chat, request = await response_request(
            body, items, self._state.engine.text, request_id=response["id"], adapter=self._state.adapter_of(model)
        )
        run = ResponseRun(self._state, self._responses, response, chat, request)
        await self.start(run, stored.owner, streams=stored.streams)

    async def _fail(self, stored: StoredResponse, code: str, message: str) -> None:
        response = stored.response | {"status": "failed", "error": {"code": code, "message": message}}
        await self._responses.update(response)
        if stored.streams:
            number = await self._responses.last_event(response["id"]) + 1
            event = sse("response.failed", sequence_number=number, response=response)
            await self._responses.add_events(response["id"], [(number, event)])

    async def _work(self, job: _Job) -> None:
        own_exchange(self._keys.get(job.owner))
        try:
            async with self._slots, aclosing(job.run.events(await self._ticket())) as events:
                async for event in events:
                    if job.log is not None:
                        job.log.append(event)
        except StoreFailed as error:
            _log.error("response %s could not be stored: %s", job.run.response["id"], error)
        await self._finish(job)

    async def _ticket(self) -> Ticket:
        """Wait until the engine has room for a request."""
        while True:
            try:
                if not self._state.engine.sleep_level:
                    return self._state.admission.enter(1)
            except ApiError:
                pass  # full
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _finish(self, job: _Job) -> None:
        """Let a job go when all that it told is stored; what followers wait for is there, or will never be."""
        try:
            if job.log is not None:
                await job.log.close()
        except StoreFailed as error:
            _log.error("events of response %s could not be stored: %s", job.run.response["id"], error)
        self._jobs.pop(job.run.response["id"], None)
        if job.log is not None:
            job.log.tell()
