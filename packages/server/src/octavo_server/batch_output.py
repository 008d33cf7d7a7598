"""Writes a batch's results: each line as OpenAI shows it, and the files of those that succeeded and that did not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any, BinaryIO

from octavo_server.local_calls import LocalAnswer
from octavo_server.store.batches import KEEP, BatchLine, StoredBatch
from octavo_server.store.files import StoredFile
from octavo_server.store.store import Store

_KEEP_SECONDS = 30 * 24 * 3600
_NUM_LINES = 200  # that are in memory at once

_GIVEN_UP = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed before the batch was cancelled."),
}


def answered(custom_id: str, answer: LocalAnswer) -> str:
    """Return the line of a request that was answered, well or with an error."""
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": json.loads(answer.body)}
    return _line(custom_id, response, None)


class BatchOutput:
    """The files of one batch.

    Args:
        store: has the results, and takes the files.
        batch: whose they are; its outcome is clear.

    Attributes:
        files: those that were written.
        members: what they change in the batch.
    """

    def __init__(self, store: Store, batch: StoredBatch) -> None:
        self._store = store
        self._batch = batch
        self._usage = _Usage()
        self.files: list[StoredFile] = []
        self.members: dict[str, Any] = {}

    async def write(self) -> None:
        """Write the files; none where there would be nothing in it."""
        await self._write("output", succeeded=True)
        await self._write("error", succeeded=False)
        self.members["usage"] = self._usage.shown()

    async def _write(self, name: str, *, succeeded: bool) -> None:
        files, file_id = self._store.files, self._store.files.new_id()
        path = files.path(file_id)
        with path.open("wb") as file:
            after = 0
            while lines := await self._results(after, succeeded=succeeded):
                if succeeded:
                    self._usage.add(lines)
                await asyncio.to_thread(file.writelines, [f"{line.result}\n".encode() for line in lines])
                after = lines[-1].line
            if not succeeded:
                await self._write_given_up(file)
            num_bytes = file.tell()
        if not num_bytes:
            path.unlink()
            return
        created_at = int(time.time())
        filename = f"{self._batch.id}_{name}.jsonl"
        expires_at = created_at + (self._batch.batch[KEEP] or _KEEP_SECONDS)
        stored = StoredFile(file_id, self._batch.owner, created_at, expires_at, filename, "batch_output", num_bytes)
        self.files.append(stored)
        self.members[f"{name}_file_id"] = file_id

    async def _results(self, after: int, *, succeeded: bool) -> list[BatchLine]:
        return await self._store.batches.results(self._batch.id, succeeded=succeeded, after=after, limit=_NUM_LINES)

    async def _write_given_up(self, file: BinaryIO) -> None:
        """Write the lines that were not computed, and why."""
        after = 0
        while lines := await self._store.batches.pending_lines(self._batch.id, after=after, limit=_NUM_LINES):
            code, message = _GIVEN_UP[self._batch.outcome or ""]
            error = {"code": code, "message": message}
            texts = [f"{_line(line.custom_id, None, error)}\n".encode() for line in lines]
            await asyncio.to_thread(file.writelines, texts)
            after = lines[-1].line


class _Usage:
    """The tokens of a batch's answers."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("input", "cached", "output", "reasoning", "total"), 0)

    def add(self, lines: list[BatchLine]) -> None:
        for line in lines:
            usage = json.loads(line.result or "")["response"]["body"].get("usage") or {}
            of_input = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or {}
            of_output = usage.get("output_tokens_details") or {}
            self._sums["input"] += usage.get("input_tokens", usage.get("prompt_tokens", 0))
            self._sums["output"] += usage.get("output_tokens", usage.get("completion_tokens", 0))
            self._sums["total"] += usage.get("total_tokens", 0)
            self._sums["cached"] += of_input.get("cached_tokens", 0)
            self._sums["reasoning"] += of_output.get("reasoning_tokens", 0)

    def shown(self) -> dict[str, Any]:
        return {
            "input_tokens": self._sums["input"],
            "input_tokens_details": {"cached_tokens": self._sums["cached"]},
            "output_tokens": self._sums["output"],
            "output_tokens_details": {"reasoning_tokens": self._sums["reasoning"]},
            "total_tokens": self._sums["total"],
        }


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line)
