"""The state of a server: whether it lives, whether it takes requests, which versions it runs."""

from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast

from openai import not_given

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options, root_url
from octavo_client.wire_server import Health, Ready, Version

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncServer", "Server"]

_AnswerT = TypeVar("_AnswerT", Health, Ready, Version)


class Server:
    """GET /health, /ready and /version.

    Every method raises `openai.APIError` if the request failed and `InvalidAnswerError` if the server is not Octavo's.
    """

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "ServerWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return ServerWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "ServerWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return ServerWithStreamingResponse(self)

    def health(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Health:
        """Ask whether the engine makes progress; a failing one raises `openai.InternalServerError` (503)."""
        return self._get("/health", Health, extra_headers, extra_query, timeout)

    def ready(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Ready:
        """Ask whether requests are accepted; one that loads or drains raises `openai.InternalServerError` (503)."""
        return self._get("/ready", Ready, extra_headers, extra_query, timeout)

    def version(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Version:
        """Ask for the versions of the server and of what it runs."""
        return self._get("/version", Version, extra_headers, extra_query, timeout)

    def _get(
        self,
        path: str,
        answer: type[_AnswerT],
        extra_headers: _sdk.Headers | None,
        extra_query: _sdk.Query | None,
        timeout: Timeout,
    ) -> _AnswerT:
        return self._client.get(
            root_url(self._client.base_url, path),
            cast_to=cast("type[_AnswerT]", object),
            options=answer_options(answer, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout),
        )


class AsyncServer:
    """GET /health, /ready and /version, awaited; errors as in `Server`."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncServerWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncServerWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncServerWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncServerWithStreamingResponse(self)

    async def health(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Health:
        """Ask whether the engine makes progress; a failing one raises `openai.InternalServerError` (503)."""
        return await self._get("/health", Health, extra_headers, extra_query, timeout)

    async def ready(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Ready:
        """Ask whether requests are accepted; one that loads or drains raises `openai.InternalServerError` (503)."""
        return await self._get("/ready", Ready, extra_headers, extra_query, timeout)

    async def version(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Version:
        """Ask for the versions of the server and of what it runs."""
        return await self._get("/version", Version, extra_headers, extra_query, timeout)

    async def _get(
        self,
        path: str,
        answer: type[_AnswerT],
        extra_headers: _sdk.Headers | None,
        extra_query: _sdk.Query | None,
        timeout: Timeout,
    ) -> _AnswerT:
        return await self._client.get(
            root_url(self._client.base_url, path),
            cast_to=cast("type[_AnswerT]", object),
            options=answer_options(answer, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout),
        )


class ServerWithRawResponse:
    """`Server`, answering with HTTP responses."""

    def __init__(self, server: Server) -> None:
        self.health = _sdk.to_raw_response_wrapper(server.health)
        self.ready = _sdk.to_raw_response_wrapper(server.ready)
        self.version = _sdk.to_raw_response_wrapper(server.version)


class AsyncServerWithRawResponse:
    """`AsyncServer`, answering with HTTP responses."""

    def __init__(self, server: AsyncServer) -> None:
        self.health = _sdk.async_to_raw_response_wrapper(server.health)
        self.ready = _sdk.async_to_raw_response_wrapper(server.ready)
        self.version = _sdk.async_to_raw_response_wrapper(server.version)


class ServerWithStreamingResponse:
    """`Server`, answering with unread HTTP responses."""

    def __init__(self, server: Server) -> None:
        self.health = _sdk.to_streamed_response_wrapper(server.health)
        self.ready = _sdk.to_streamed_response_wrapper(server.ready)
        self.version = _sdk.to_streamed_response_wrapper(server.version)


class AsyncServerWithStreamingResponse:
    """`AsyncServer`, answering with unread HTTP responses."""

    def __init__(self, server: AsyncServer) -> None:
        self.health = _sdk.async_to_streamed_response_wrapper(server.health)
        self.ready = _sdk.async_to_streamed_response_wrapper(server.ready)
        self.version = _sdk.async_to_streamed_response_wrapper(server.version)
