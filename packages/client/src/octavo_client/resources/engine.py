"""What administrators do with a served model: put it aside, bring it back, give it other weights."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from openai import RequestOptions, not_given
from pydantic import BaseModel

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options, root_url
from octavo_client.wire_admin import (
    MemoryReport,
    PrefixCacheReset,
    SleepLevel,
    SleepMode,
    SleepState,
    SleepTag,
    UpdateWeightsRequest,
)

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncEngineControl", "EngineControl"]


class EngineControl:
    """POST /sleep, /wake_up, /update_weights_from_disk and /reset_prefix_cache, GET /is_sleeping.

    Every method raises `openai.PermissionDeniedError` or `openai.AuthenticationError` without the admin key where one
    is needed, `openai.APIError` if the request failed, and `InvalidAnswerError` if the server is not Octavo's.

    Example:
        >>> engine = Octavo(api_key="the admin key").engine
        >>> engine.sleep(mode="wait").freed_bytes
        412921856
        >>> engine.wake_up().sleep_level
        0
    """

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "EngineControlWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return EngineControlWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "EngineControlWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return EngineControlWithStreamingResponse(self)

    def sleep(
        self,
        level: SleepLevel = 1,
        *,
        mode: SleepMode | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> MemoryReport:
        """Let go of the weights and the KV cache, so that their memory is the system's until `wake_up`.

        Args:
            level: 1 to serve the same model again, 2 to give its weights up.
            mode: what becomes of requests that run: "wait" for their ends, "abort" them; None refuses to sleep.
            extra_headers: sent with the request.
            extra_query: sent with the request.
            timeout: in seconds; waiting counts.

        Raises:
            openai.ConflictError: requests run and there is no mode, or the engine is busy with the like already.
        """
        options = _options(MemoryReport, {"level": level, "mode": mode}, extra_headers, extra_query, timeout)
        return self._client.post(
            root_url(self._client.base_url, "/sleep"), cast_to=cast("type[MemoryReport]", object), options=options
        )

    def wake_up(
        self,
        *,
        tags: Sequence[SleepTag] | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> MemoryReport:
        """Take the model into memory again; in parts by `tags`, else altogether."""
        options = _options(
            MemoryReport, {"tags": ",".join(tags) if tags else None}, extra_headers, extra_query, timeout
        )
        return self._client.post(
            root_url(self._client.base_url, "/wake_up"), cast_to=cast("type[MemoryReport]", object), options=options
        )

    def is_sleeping(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> SleepState:
        """Ask whether the engine sleeps, and how deep."""
        options = _options(SleepState, {}, extra_headers, extra_query, timeout)
        return self._client.get(
            root_url(self._client.base_url, "/is_sleeping"), cast_to=cast("type[SleepState]", object), options=options
        )

    def update_weights(
        self,
        model_path: str,
        *,
        mode: SleepMode | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> MemoryReport:
        """Serve the weights of other files from now on, of the same shape and with the same tokenizer.

        Args:
            model_path: on the server: a GGUF file, a folder in Hugging Face layout, or a hub id.
            mode: as for `sleep`.
            extra_headers: sent with the request.
            extra_query: sent with the request.
            timeout: in seconds; reading the weights counts.

        Raises:
            openai.BadRequestError: they cannot be read, or are of another model; the old ones serve on.
            openai.ConflictError: as for `sleep`.
        """
        body = UpdateWeightsRequest.model_validate(
            {"model_path": model_path} | ({} if mode is None else {"mode": mode})
        ).body()
        options = _options(MemoryReport, {}, extra_headers, extra_query, timeout)
        return self._client.post(
            root_url(self._client.base_url, "/update_weights_from_disk"),
            cast_to=cast("type[MemoryReport]", object),
            body=body,
            options=options,
        )

    def reset_prefix_cache(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> PrefixCacheReset:
        """Forget all cached prefixes and drop all pins."""
        options = _options(PrefixCacheReset, {}, extra_headers, extra_query, timeout)
        return self._client.post(
            root_url(self._client.base_url, "/reset_prefix_cache"),
            cast_to=cast("type[PrefixCacheReset]", object),
            options=options,
        )


class AsyncEngineControl:
    """The routes of `EngineControl`, awaited; errors as there."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncEngineControlWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncEngineControlWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncEngineControlWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncEngineControlWithStreamingResponse(self)

    async def sleep(
        self,
        level: SleepLevel = 1,
        *,
        mode: SleepMode | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> MemoryReport:
        """Let go of the weights and the KV cache; see `EngineControl.sleep`."""
        options = _options(MemoryReport, {"level": level, "mode": mode}, extra_headers, extra_query, timeout)
        return await self._client.post(
            root_url(self._client.base_url, "/sleep"), cast_to=cast("type[MemoryReport]", object), options=options
        )

    async def wake_up(
        self,
        *,
        tags: Sequence[SleepTag] | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> MemoryReport:
        """Take the model into memory again; see `EngineControl.wake_up`."""
        options = _options(
            MemoryReport, {"tags": ",".join(tags) if tags else None}, extra_headers, extra_query, timeout
        )
        return await self._client.post(
            root_url(self._client.base_url, "/wake_up"), cast_to=cast("type[MemoryReport]", object), options=options
        )

    async def is_sleeping(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> SleepState:
        """Ask whether the engine sleeps, and how deep."""
        options = _options(SleepState, {}, extra_headers, extra_query, timeout)
        return await self._client.get(
            root_url(self._client.base_url, "/is_sleeping"), cast_to=cast("type[SleepState]", object), options=options
        )

    async def update_weights(
        self,
        model_path: str,
        *,
        mode: SleepMode | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> MemoryReport:
        """Serve the weights of other files from now on; see `EngineControl.update_weights`."""
        body = UpdateWeightsRequest.model_validate(
            {"model_path": model_path} | ({} if mode is None else {"mode": mode})
        ).body()
        options = _options(MemoryReport, {}, extra_headers, extra_query, timeout)
        return await self._client.post(
            root_url(self._client.base_url, "/update_weights_from_disk"),
            cast_to=cast("type[MemoryReport]", object),
            body=body,
            options=options,
        )

    async def reset_prefix_cache(
        self,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> PrefixCacheReset:
        """Forget all cached prefixes and drop all pins."""
        options = _options(PrefixCacheReset, {}, extra_headers, extra_query, timeout)
        return await self._client.post(
            root_url(self._client.base_url, "/reset_prefix_cache"),
            cast_to=cast("type[PrefixCacheReset]", object),
            options=options,
        )


class EngineControlWithRawResponse:
    """`EngineControl`, answering with HTTP responses."""

    def __init__(self, engine: EngineControl) -> None:
        self.sleep = _sdk.to_raw_response_wrapper(engine.sleep)
        self.wake_up = _sdk.to_raw_response_wrapper(engine.wake_up)
        self.is_sleeping = _sdk.to_raw_response_wrapper(engine.is_sleeping)
        self.update_weights = _sdk.to_raw_response_wrapper(engine.update_weights)
        self.reset_prefix_cache = _sdk.to_raw_response_wrapper(engine.reset_prefix_cache)


class AsyncEngineControlWithRawResponse:
    """`AsyncEngineControl`, answering with HTTP responses."""

    def __init__(self, engine: AsyncEngineControl) -> None:
        self.sleep = _sdk.async_to_raw_response_wrapper(engine.sleep)
        self.wake_up = _sdk.async_to_raw_response_wrapper(engine.wake_up)
        self.is_sleeping = _sdk.async_to_raw_response_wrapper(engine.is_sleeping)
        self.update_weights = _sdk.async_to_raw_response_wrapper(engine.update_weights)
        self.reset_prefix_cache = _sdk.async_to_raw_response_wrapper(engine.reset_prefix_cache)


class EngineControlWithStreamingResponse:
    """`EngineControl`, answering with unread HTTP responses."""

    def __init__(self, engine: EngineControl) -> None:
        self.sleep = _sdk.to_streamed_response_wrapper(engine.sleep)
        self.wake_up = _sdk.to_streamed_response_wrapper(engine.wake_up)
        self.is_sleeping = _sdk.to_streamed_response_wrapper(engine.is_sleeping)
        self.update_weights = _sdk.to_streamed_response_wrapper(engine.update_weights)
        self.reset_prefix_cache = _sdk.to_streamed_response_wrapper(engine.reset_prefix_cache)


class AsyncEngineControlWithStreamingResponse:
    """`AsyncEngineControl`, answering with unread HTTP responses."""

    def __init__(self, engine: AsyncEngineControl) -> None:
        self.sleep = _sdk.async_to_streamed_response_wrapper(engine.sleep)
        self.wake_up = _sdk.async_to_streamed_response_wrapper(engine.wake_up)
        self.is_sleeping = _sdk.async_to_streamed_response_wrapper(engine.is_sleeping)
        self.update_weights = _sdk.async_to_streamed_response_wrapper(engine.update_weights)
        self.reset_prefix_cache = _sdk.async_to_streamed_response_wrapper(engine.reset_prefix_cache)


def _options(
    answer: type[BaseModel],
    query: Mapping[str, object],
    extra_headers: _sdk.Headers | None,
    extra_query: _sdk.Query | None,
    timeout: Timeout,
) -> RequestOptions:
    given = {name: value for name, value in query.items() if value is not None} | dict(extra_query or {})
    return answer_options(answer, extra_headers=extra_headers, extra_query=given or None, timeout=timeout)
