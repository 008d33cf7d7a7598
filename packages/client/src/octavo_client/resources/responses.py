"""Responses: the SDK's resource, and what those in the background need: waiting, and streams that do not break.

`create`, `stream`, `parse`, `retrieve`, `delete`, `cancel` and `input_items` are the SDK's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import httpx2
from openai import APIConnectionError, omit
from openai.resources.responses import AsyncResponses as SdkAsyncResponses
from openai.resources.responses import Responses as SdkResponses
from openai.types.responses import Response, ResponseStreamEvent

from octavo_client.errors import InvalidAnswerError
from octavo_client.resources._waiting import FIRST_PAUSE, LONGEST_PAUSE, pauses

__all__ = ["AsyncResponses", "Responses"]

_BROKEN = (APIConnectionError, httpx2.TransportError)
_AT_WORK = ("queued", "in_progress")
_LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed")


class Responses(SdkResponses):
    """/v1/responses; every method raises `openai.APIError` if a request failed.

    Example:
        >>> client = Octavo()
        >>> answer = client.responses.create(model="smollm2", input="Hello", background=True)
        >>> client.responses.wait(answer.id).output_text
    """

    def wait(self, response_id: str, *, timeout: float | None = None) -> Response:
        """Wait until a response that is made in the background has ended, and return it.

        Args:
            response_id: from `create(..., background=True)`.
            timeout: in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it has not ended within `timeout`.
        """
        rest = pauses(f"response {response_id}", timeout)
        while (response := self.retrieve(response_id)).status in _AT_WORK:
            time.sleep(next(rest))
        return response

    def follow(self, response_id: str, *, starting_after: int | None = None) -> Iterator[ResponseStreamEvent]:
        """Return the events of a response that is streamed in the background, to its end, each once.

        Where the connection breaks, or the server is started again, the stream is taken up behind the last event.

        Args:
            response_id: from `create(..., background=True, stream=True)`.
            starting_after: the `sequence_number` of the last event that is known; None begins with the first.

        Raises:
            openai.APIConnectionError, httpx2.TransportError: the server was not there, or its connections broke, for
                more than `max_retries` attempts on end.
            InvalidAnswerError: streams ended before the response did as often.

        Example:
            >>> for event in client.responses.follow(answer.id):
            ...     if event.type == "response.output_text.delta":
            ...         print(event.delta, end="")
        """
        pause, num_failures = FIRST_PAUSE, 0
        while True:
            broken: Exception | None = None
            try:
                after = omit if starting_after is None else starting_after
                with self.retrieve(response_id, stream=True, starting_after=after) as events:
                    for event in events:
                        yield event
                        if event.type in _LAST_EVENTS:
                            return
                        starting_after, pause, num_failures = event.sequence_number, FIRST_PAUSE, 0
            except _BROKEN as error:
                broken = error
            num_failures += 1
            _check(num_failures, self._client.max_retries, broken)
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


class AsyncResponses(SdkAsyncResponses):
    """/v1/responses, awaited; errors as in `Responses`."""

    async def wait(self, response_id: str, *, timeout: float | None = None) -> Response:
        """Wait until a response that is made in the background has ended, and return it; see `Responses.wait`."""
        rest = pauses(f"response {response_id}", timeout)
        while (response := await self.retrieve(response_id)).status in _AT_WORK:
            await asyncio.sleep(next(rest))
        return response

    async def follow(
        self, response_id: str, *, starting_after: int | None = None
    ) -> AsyncIterator[ResponseStreamEvent]:
        """Return the events of a response that is streamed in the background; see `Responses.follow`.

        Example:
            >>> async for event in client.responses.follow(answer.id):
            ...     print(event.type)
        """
        pause, num_failures = FIRST_PAUSE, 0
        while True:
            broken: Exception | None = None
            try:
                after = omit if starting_after is None else starting_after
                async with await self.retrieve(response_id, stream=True, starting_after=after) as events:
                    async for event in events:
                        yield event
                        if event.type in _LAST_EVENTS:
                            return
                        starting_after, pause, num_failures = event.sequence_number, FIRST_PAUSE, 0
            except _BROKEN as error:
                broken = error
            num_failures += 1
            _check(num_failures, self._client.max_retries, broken)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)


def _check(num_failures: int, max_retries: int, broken: Exception | None) -> None:
    """Give up where a stream was broken, or ended before its time, too often on end."""
    if num_failures > max_retries:
        raise broken or InvalidAnswerError("expected a stream to its last event, got one that ended before it")
