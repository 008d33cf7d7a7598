"""The prefix cache of a served model: prompts computed ahead, and prompts that stay."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import quote

from openai import RequestOptions, not_given

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options
from octavo_client.wire_cache import (
    CachePin,
    CachePinDeleted,
    CachePinList,
    CachePinRequest,
    CacheWarmRequest,
    CacheWarmResponse,
)

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncCache", "Cache"]

_WARM = "/cache/warm"
_PINS = "/cache/pins"

_AnswerT = TypeVar("_AnswerT", CacheWarmResponse, CachePin, CachePinList, CachePinDeleted)
Messages = Iterable[Mapping[str, object]]


class Cache:
    """POST /v1/cache/warm; POST, GET and DELETE /v1/cache/pins.

    Every method raises `openai.APIError` if the request failed and `InvalidAnswerError` if the server is not Octavo's.
    """

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "CacheWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return CacheWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "CacheWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return CacheWithStreamingResponse(self)

    def warm(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CacheWarmResponse:
        """Compute prompts, or the beginning of a chat, into the prefix cache; `CacheWarmRequest` describes the fields.

        Raises:
            pydantic.ValidationError: not exactly one of `prompt` and `messages` is given.
        """
        body = _body(CacheWarmRequest, prompt=prompt, messages=messages, model=model, cache_salt=cache_salt)
        options = answer_options(
            CacheWarmResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
        )
        return self._client.post(_WARM, cast_to=cast("type[CacheWarmResponse]", object), body=body, options=options)

    def pin(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CachePin:
        """Compute a prompt, or the beginning of a chat, into the prefix cache and keep it there until `unpin`.

        The server refuses (400, code `pin_limit_reached`) what would make pins take more of the cache than they may.

        Raises:
            pydantic.ValidationError: not exactly one of `prompt` and `messages` is given.
        """
        body = _body(CachePinRequest, prompt=prompt, messages=messages, model=model, cache_salt=cache_salt)
        options = answer_options(CachePin, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return self._client.post(_PINS, cast_to=cast("type[CachePin]", object), body=body, options=options)

    def pins(
        self,
        *,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CachePinList:
        """List the pins of a salt; without one, those that have none."""
        options = _pin_options(CachePinList, cache_salt, extra_headers, extra_query, timeout)
        return self._client.get(_PINS, cast_to=cast("type[CachePinList]", object), options=options)

    def unpin(
        self,
        pin_id: str,
        *,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CachePinDeleted:
        """Let go of a pin; a pin of another salt is not found (`openai.NotFoundError`)."""
        options = _pin_options(CachePinDeleted, cache_salt, extra_headers, extra_query, timeout)
        return self._client.delete(_pin_path(pin_id), cast_to=cast("type[CachePinDeleted]", object), options=options)


class AsyncCache:
    """POST /v1/cache/warm; POST, GET and DELETE /v1/cache/pins, awaited; errors as in `Cache`."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncCacheWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncCacheWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncCacheWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncCacheWithStreamingResponse(self)

    async def warm(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CacheWarmResponse:
        """Compute prompts, or the beginning of a chat, into the prefix cache; see `Cache.warm`."""
        body = _body(CacheWarmRequest, prompt=prompt, messages=messages, model=model, cache_salt=cache_salt)
        options = answer_options(
            CacheWarmResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
        )
        return await self._client.post(
            _WARM, cast_to=cast("type[CacheWarmResponse]", object), body=body, options=options
        )

    async def pin(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Messages | None = None,
        model: str | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CachePin:
        """Compute a prompt into the prefix cache and keep it there until `unpin`; see `Cache.pin`."""
        body = _body(CachePinRequest, prompt=prompt, messages=messages, model=model, cache_salt=cache_salt)
        options = answer_options(CachePin, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return await self._client.post(_PINS, cast_to=cast("type[CachePin]", object), body=body, options=options)

    async def pins(
        self,
        *,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CachePinList:
        """List the pins of a salt; without one, those that have none."""
        options = _pin_options(CachePinList, cache_salt, extra_headers, extra_query, timeout)
        return await self._client.get(_PINS, cast_to=cast("type[CachePinList]", object), options=options)

    async def unpin(
        self,
        pin_id: str,
        *,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> CachePinDeleted:
        """Let go of a pin; a pin of another salt is not found (`openai.NotFoundError`)."""
        options = _pin_options(CachePinDeleted, cache_salt, extra_headers, extra_query, timeout)
        return await self._client.delete(
            _pin_path(pin_id), cast_to=cast("type[CachePinDeleted]", object), options=options
        )


class CacheWithRawResponse:
    """`Cache`, answering with HTTP responses."""

    def __init__(self, cache: Cache) -> None:
        self.warm = _sdk.to_raw_response_wrapper(cache.warm)
        self.pin = _sdk.to_raw_response_wrapper(cache.pin)
        self.pins = _sdk.to_raw_response_wrapper(cache.pins)
        self.unpin = _sdk.to_raw_response_wrapper(cache.unpin)


class AsyncCacheWithRawResponse:
    """`AsyncCache`, answering with HTTP responses."""

    def __init__(self, cache: AsyncCache) -> None:
        self.warm = _sdk.async_to_raw_response_wrapper(cache.warm)
        self.pin = _sdk.async_to_raw_response_wrapper(cache.pin)
        self.pins = _sdk.async_to_raw_response_wrapper(cache.pins)
        self.unpin = _sdk.async_to_raw_response_wrapper(cache.unpin)


class CacheWithStreamingResponse:
    """`Cache`, answering with unread HTTP responses."""

    def __init__(self, cache: Cache) -> None:
        self.warm = _sdk.to_streamed_response_wrapper(cache.warm)
        self.pin = _sdk.to_streamed_response_wrapper(cache.pin)
        self.pins = _sdk.to_streamed_response_wrapper(cache.pins)
        self.unpin = _sdk.to_streamed_response_wrapper(cache.unpin)


class AsyncCacheWithStreamingResponse:
    """`AsyncCache`, answering with unread HTTP responses."""

    def __init__(self, cache: AsyncCache) -> None:
        self.warm = _sdk.async_to_streamed_response_wrapper(cache.warm)
        self.pin = _sdk.async_to_streamed_response_wrapper(cache.pin)
        self.pins = _sdk.async_to_streamed_response_wrapper(cache.pins)
        self.unpin = _sdk.async_to_streamed_response_wrapper(cache.unpin)


def _body(
    kind: type[CacheWarmRequest] | type[CachePinRequest], *, messages: Messages | None, **fields: object
) -> dict[str, object]:
    given = {name: value for name, value in fields.items() if value is not None}
    if messages is not None:
        given["messages"] = [dict(message) for message in messages]
    return {**kind.model_validate(given)}


def _pin_path(pin_id: str) -> str:
    return f"{_PINS}/{quote(pin_id, safe='')}"


def _pin_options(
    answer: type[_AnswerT],
    cache_salt: str | None,
    extra_headers: _sdk.Headers | None,
    extra_query: _sdk.Query | None,
    timeout: Timeout,
) -> RequestOptions:
    query = dict(extra_query or {}) | ({} if cache_salt is None else {"cache_salt": cache_salt})
    return answer_options(answer, extra_headers=extra_headers, extra_query=query or None, timeout=timeout)
