"""Batches: the SDK's resource, and a batch from requests to typed results without handling its files.

`create`, `retrieve`, `list` and `cancel` are the SDK's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, cast

from openai import omit
from openai.resources.batches import AsyncBatches as SdkAsyncBatches
from openai.resources.batches import Batches as SdkBatches
from openai.types import Batch

from octavo_client.resources._waiting import pauses
from octavo_client.wire_batches import BatchLineRequest, BatchLineResult, Endpoint

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncBatches", "Batches"]

_ENDED = ("completed", "failed", "expired", "cancelled")
_WINDOW = "24h"


class Batches(SdkBatches):
    """/v1/batches; every method raises `openai.APIError` if a request failed.

    Example:
        >>> client = Octavo()
        >>> questions = {"fr": "Capital of France?", "it": "Capital of Italy?"}
        >>> bodies = {key: {"model": "smollm2", "input": text} for key, text in questions.items()}
        >>> batch = client.batches.submit(bodies, endpoint="/v1/responses")
        >>> for result in client.batches.results(client.batches.wait(batch.id)):
        ...     print(result.custom_id, result.succeeded)
    """

    def submit(
        self,
        bodies: Mapping[str, Mapping[str, object]],
        *,
        endpoint: Endpoint = "/v1/chat/completions",
        completion_window: str = _WINDOW,
        metadata: dict[str, str] | None = None,
    ) -> Batch:
        """Upload requests and begin a batch of them.

        Args:
            bodies: what would be posted to the endpoint, by the names that the results will have.
            endpoint: the route that answers them.
            completion_window: within which they must be answered: a number and s, m, h or d.
            metadata: up to 16 short texts that stay with the batch.

        Raises:
            pydantic.ValidationError: a name or a body cannot be sent.
        """
        file = cast("Octavo", self._client).files.create_lines(_lines(bodies, endpoint))
        return self.create(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window=completion_window,  # type: ignore[arg-type]  # OpenAI's has one value
            metadata=omit if metadata is None else metadata,
        )

    def wait(self, batch_id: str, *, timeout: float | None = None) -> Batch:
        """Wait until a batch has ended, and return it.

        Args:
            batch_id: of the batch.
            timeout: in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it has not ended within `timeout`.
        """
        rest = pauses(f"batch {batch_id}", timeout)
        while (batch := self.retrieve(batch_id)).status not in _ENDED:
            time.sleep(next(rest))
        return batch

    def results(self, batch: Batch) -> Iterator[BatchLineResult]:
        """Return what has come of an ended batch's requests, those that failed behind the others."""
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                for line in cast("Octavo", self._client).files.lines(file_id):
                    yield BatchLineResult.model_validate(line)


class AsyncBatches(SdkAsyncBatches):
    """/v1/batches, awaited; errors as in `Batches`."""

    async def submit(
        self,
        bodies: Mapping[str, Mapping[str, object]],
        *,
        endpoint: Endpoint = "/v1/chat/completions",
        completion_window: str = _WINDOW,
        metadata: dict[str, str] | None = None,
    ) -> Batch:
        """Upload requests and begin a batch of them; see `Batches.submit`."""
        file = await cast("AsyncOctavo", self._client).files.create_lines(_lines(bodies, endpoint))
        return await self.create(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window=completion_window,  # type: ignore[arg-type]  # OpenAI's has one value
            metadata=omit if metadata is None else metadata,
        )

    async def wait(self, batch_id: str, *, timeout: float | None = None) -> Batch:
        """Wait until a batch has ended, and return it; see `Batches.wait`."""
        rest = pauses(f"batch {batch_id}", timeout)
        while (batch := await self.retrieve(batch_id)).status not in _ENDED:
            await asyncio.sleep(next(rest))
        return batch

    async def results(self, batch: Batch) -> AsyncIterator[BatchLineResult]:
        """Return what has come of an ended batch's requests, those that failed behind the others."""
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                async for line in cast("AsyncOctavo", self._client).files.lines(file_id):
                    yield BatchLineResult.model_validate(line)


def _lines(bodies: Mapping[str, Mapping[str, object]], endpoint: Endpoint) -> list[dict[str, object]]:
    requests = [
        BatchLineRequest.model_validate({"custom_id": custom_id, "url": endpoint, "body": dict(body)})
        for custom_id, body in bodies.items()
    ]
    return [request.model_dump(mode="json") for request in requests]
