"""What happened to requests, and answers that are kept so that other requests can go on from them."""

from functools import cached_property
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from openai import not_given

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options
from octavo_client.wire import ReleasedRequest
from octavo_client.wire_timeline import RequestTimeline

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncRequests", "Requests"]


class Requests:
    """GET /v1/requests/{id}/timeline and DELETE /v1/requests/{id}.

    Example:
        >>> client = Octavo()
        >>> answer = client.completions.create(model="smollm2", prompt="The capital of France is")
        >>> client.requests.timeline(answer.id).waits[0].seconds
        0.0002
    """

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "RequestsWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return RequestsWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "RequestsWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return RequestsWithStreamingResponse(self)

    def timeline(
        self,
        request_id: str,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> RequestTimeline:
        """Tell what happened to a request, by the id of its answer, while it runs or after: why it waited, its chunks.

        With several prompts the id is that of the answer, a hyphen and the prompt's number.

        Raises:
            ValueError: the id is empty.
            openai.NotFoundError: it is unknown, ended too long ago, or is another key's.
            openai.APIError: the request failed.
            InvalidAnswerError: the server is not Octavo's.
        """
        return self._client.get(
            f"{_path(request_id)}/timeline",
            cast_to=cast("type[RequestTimeline]", object),
            options=answer_options(
                RequestTimeline, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )

    def release(
        self,
        request_id: str,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> ReleasedRequest:
        """Let go of an answer that was asked for with `Extras(keep=True)`, by its id; what only it holds is free.

        Raises:
            ValueError: the id is empty.
            openai.NotFoundError: no such answer is kept, or no longer.
            openai.APIError: the request failed.
            InvalidAnswerError: the server is not Octavo's.
        """
        return self._client.delete(
            _path(request_id),
            cast_to=cast("type[ReleasedRequest]", object),
            options=answer_options(
                ReleasedRequest, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )


class AsyncRequests:
    """GET /v1/requests/{id}/timeline and DELETE /v1/requests/{id}, awaited; errors as in `Requests`."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncRequestsWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncRequestsWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncRequestsWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncRequestsWithStreamingResponse(self)

    async def timeline(
        self,
        request_id: str,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> RequestTimeline:
        """Tell what happened to a request; see `Requests.timeline`."""
        return await self._client.get(
            f"{_path(request_id)}/timeline",
            cast_to=cast("type[RequestTimeline]", object),
            options=answer_options(
                RequestTimeline, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )

    async def release(
        self,
        request_id: str,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> ReleasedRequest:
        """Let go of an answer that was asked for with `Extras(keep=True)`; see `Requests.release`."""
        return await self._client.delete(
            _path(request_id),
            cast_to=cast("type[ReleasedRequest]", object),
            options=answer_options(
                ReleasedRequest, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )


class RequestsWithRawResponse:
    """`Requests`, answering with HTTP responses."""

    def __init__(self, requests: Requests) -> None:
        self.timeline = _sdk.to_raw_response_wrapper(requests.timeline)
        self.release = _sdk.to_raw_response_wrapper(requests.release)


class AsyncRequestsWithRawResponse:
    """`AsyncRequests`, answering with HTTP responses."""

    def __init__(self, requests: AsyncRequests) -> None:
        self.timeline = _sdk.async_to_raw_response_wrapper(requests.timeline)
        self.release = _sdk.async_to_raw_response_wrapper(requests.release)


class RequestsWithStreamingResponse:
    """`Requests`, answering with unread HTTP responses."""

    def __init__(self, requests: Requests) -> None:
        self.timeline = _sdk.to_streamed_response_wrapper(requests.timeline)
        self.release = _sdk.to_streamed_response_wrapper(requests.release)


class AsyncRequestsWithStreamingResponse:
    """`AsyncRequests`, answering with unread HTTP responses."""

    def __init__(self, requests: AsyncRequests) -> None:
        self.timeline = _sdk.async_to_streamed_response_wrapper(requests.timeline)
        self.release = _sdk.async_to_streamed_response_wrapper(requests.release)


def _path(request_id: str) -> str:
    if not request_id:
        raise ValueError("expected the id of an answer, got an empty string")
    return f"/requests/{quote(request_id, safe='')}"
