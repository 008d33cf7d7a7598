"""BatchRunner: takes batches from their input file to their output, behind all that a client waits for."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import suppress
from contextvars import Context
from typing import Any

from prometheus_client import Counter

from octavo_engine.errors import InvalidRequest
from octavo_server.batch_input import BatchInput
from octavo_server.batch_output import BatchOutput, answered
from octavo_server.config import ServerSettings
from octavo_server.errors import error_response
from octavo_server.generation import cancel_all
from octavo_server.local_calls import LocalAnswer, LocalCalls
from octavo_server.protocol.batches import request_body
from octavo_server.store.batches import BatchLine, StoredBatch
from octavo_server.store.database import StoreFailed
from octavo_server.store.store import Store

PRIORITY = 1 << 20
"""Of a batch's requests in the engine's queue; those of clients have 0 unless they ask for less."""

_BUSY = (429, 503)
_PAUSE_SECONDS = 1.0  # before a line that was refused for want of room is tried again
_REST_SECONDS = 30.0  # before a batch that stopped is taken up again
_NUM_READ = 256  # lines that are looked up at once

_log = logging.getLogger(__name__)


class BatchRunner:
    """Runs every batch that has not ended; the slots limit the lines that run at once, over all batches.

    What has come of a line is stored when it ends: a server that is stopped in any way loses the lines at work, and
    the next one computes those and no others again.

    Args:
        store: has the batches.
        calls: answers their lines.
        slots: those that they share with background responses, in order of asking.
        settings: of the app.
        lines: counts those that were answered, by outcome.
    """

    def __init__(
        self, store: Store, calls: LocalCalls, slots: asyncio.Semaphore, settings: ServerSettings, lines: Counter
    ) -> None:
        self._lines = lines
        self._store = store
        self._calls = calls
        self._slots = slots
        self._settings = settings
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def num_open(self) -> int:
        """Batches that have not ended."""
        return len(self._tasks)

    def start(self, batch: StoredBatch) -> None:
        """Take a batch up where it was left."""
        # Not in the context of the request that asks for it, whose time and budget end with its own answer.
        self._tasks[batch.id] = asyncio.create_task(self._work(batch), context=Context())

    async def cancel(self, batch: StoredBatch) -> StoredBatch:
        """Stop a batch's lines, unless how it ends is clear; what is done of it will be in its files."""
        batch, has_changed = await self._store.batches.cancel(batch.id, at=int(time.time()))
        if has_changed:
            await cancel_all([self._tasks[batch.id]] if batch.id in self._tasks else [])
            self.start(batch)
        return batch

    async def recover(self) -> None:
        """Take up the batches that the last server left."""
        for batch in await self._store.batches.unfinished():
            self.start(batch)

    async def close(self) -> None:
        """Stop; the next server takes up what is at work."""
        await cancel_all(list(self._tasks.values()))

    async def _work(self, batch: StoredBatch) -> None:
        """Run a batch to its end; what goes wrong with the disk, or here, is tried again after a while."""
        while True:
            try:
                await self._run(batch)
                break
            except Exception:  # the boundary: nobody else would hear of it
                _log.exception("batch %s stopped, and is taken up again in %g s", batch.id, _REST_SECONDS)
            await asyncio.sleep(_REST_SECONDS)
            with suppress(StoreFailed):
                batch = await self._store.batches.update(batch.id)
        self._tasks.pop(batch.id, None)

    async def _run(self, batch: StoredBatch) -> None:
        if batch.outcome is None and batch.batch["status"] == "validating":
            batch = await self._validated(batch)
        if batch.batch["status"] == "failed":
            return
        if batch.outcome is None:
            outcome = await self._run_lines(batch)
            now = int(time.time())
            batch = await self._store.batches.update(batch.id, outcome=outcome, status="finalizing", finalizing_at=now)
        await self._finish(batch)

    async def _validated(self, batch: StoredBatch) -> StoredBatch:
        """Read the input file; a batch whose lines are not all sound has failed."""
        file_id, endpoint = batch.batch["input_file_id"], batch.batch["endpoint"]
        reading = BatchInput(self._store.files.path(file_id), endpoint, self._settings.max_body_bytes)
        await self._store.batches.clear_lines(batch.id)
        parts = reading.lines(_NUM_READ)
        while (lines := await asyncio.to_thread(next, parts, None)) is not None:
            await self._store.batches.add_lines(batch.id, lines)
        now = int(time.time())
        if reading.errors:
            errors = {"object": "list", "data": reading.errors}
            await self._store.batches.end(batch.id, status="failed", failed_at=now, errors=errors)
            return await self._store.batches.update(batch.id)
        return await self._store.batches.start(batch.id, status="in_progress", in_progress_at=now)

    async def _run_lines(self, batch: StoredBatch) -> str:
        """Compute the lines that have not been; return how the batch ends."""
        try:
            async with asyncio.timeout(batch.expires_at - time.time()), asyncio.TaskGroup() as running:
                after = 0
                while lines := await self._store.batches.pending_lines(batch.id, after=after, limit=_NUM_READ):
                    for line in lines:
                        await self._slots.acquire()
                        running.create_task(self._run_line(batch, line)).add_done_callback(self._release)
                    after = lines[-1].line
        except TimeoutError:
            return "expired"
        return "completed"

    def _release(self, _: asyncio.Task[None]) -> None:
        self._slots.release()

    async def _run_line(self, batch: StoredBatch, line: BatchLine) -> None:
        path = self._store.files.path(batch.batch["input_file_id"])
        raw = await asyncio.to_thread(_read, path, line)
        endpoint = batch.batch["endpoint"]
        try:
            body = request_body(raw, endpoint, PRIORITY)
        except InvalidRequest as error:
            refused = error_response(error)
            answer = LocalAnswer(refused.status_code, bytes(refused.body), uuid.uuid4().hex)
        else:
            answer = await self._answer(endpoint, body, batch.owner)
        succeeded = answer.status == 200
        result = answered(line.custom_id, answer)
        await self._store.batches.finish_line(batch.id, line.line, succeeded=succeeded, result=result)
        self._lines.labels("completed" if succeeded else "failed").inc()

    async def _answer(self, endpoint: str, body: bytes, owner: str) -> LocalAnswer:
        """Ask until the server is not too busy to answer; the batch's window is the limit."""
        while True:
            answer = await self._calls.post(endpoint, body, owner)
            if answer.status not in _BUSY:
                return answer
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _finish(self, batch: StoredBatch) -> None:
        output = BatchOutput(self._store, batch)
        await output.write()
        members: dict[str, Any] = output.members | {"status": batch.outcome, f"{batch.outcome}_at": int(time.time())}
        await self._store.batches.end(batch.id, output.files, **members)


def _read(path: Any, line: BatchLine) -> bytes:
    with path.open("rb") as file:
        file.seek(line.start)
        return bytes(file.read(line.num_bytes))
