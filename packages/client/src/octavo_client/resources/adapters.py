"""Adapters (LoRA) of a served model: loaded, replaced and unloaded while it serves."""

from functools import cached_property
from typing import TYPE_CHECKING, cast

from openai import not_given

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options
from octavo_client.wire_adapters import Adapter, AdapterUnloaded, LoadAdapterRequest, UnloadAdapterRequest

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["Adapters", "AsyncAdapters"]

_LOAD = "/load_lora_adapter"
_UNLOAD = "/unload_lora_adapter"


class Adapters:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter; `client.models.list()` has what is served.

    Every method raises `openai.PermissionDeniedError` or `openai.AuthenticationError` without the admin key where one
    is needed, `openai.APIError` if the request failed, and `InvalidAnswerError` if the server is not Octavo's.

    Example:
        >>> client = Octavo(api_key="the admin key")
        >>> client.adapters.load("pirate", "pirate-v2", load_inplace=True).rank
        16
    """

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AdaptersWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AdaptersWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AdaptersWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AdaptersWithStreamingResponse(self)

    def load(
        self,
        lora_name: str,
        lora_path: str,
        *,
        load_inplace: bool = False,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Adapter:
        """Serve an adapter under a name, which requests give as their model.

        Args:
            lora_name: the name.
            lora_path: on the server: a folder that PEFT saved, inside the folder that the server allows.
            load_inplace: whether it may take the place of an adapter of this name; requests that run keep the old one.
            extra_headers: sent with the request.
            extra_query: sent with the request.
            timeout: in seconds; reading the files counts.

        Raises:
            openai.BadRequestError: it cannot be read, does not fit the model, lies elsewhere, or the name is taken.
        """
        body = LoadAdapterRequest(lora_name=lora_name, lora_path=lora_path, load_inplace=load_inplace).body()
        options = answer_options(Adapter, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return self._client.post(_LOAD, cast_to=cast("type[Adapter]", object), body=body, options=options)

    def unload(
        self,
        lora_name: str,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> AdapterUnloaded:
        """Serve an adapter no more; requests that run go on with it.

        Raises:
            openai.NotFoundError: no adapter has this name.
        """
        body = UnloadAdapterRequest(lora_name=lora_name).body()
        options = answer_options(AdapterUnloaded, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return self._client.post(_UNLOAD, cast_to=cast("type[AdapterUnloaded]", object), body=body, options=options)


class AsyncAdapters:
    """The routes of `Adapters`, awaited; errors as there."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncAdaptersWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncAdaptersWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncAdaptersWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncAdaptersWithStreamingResponse(self)

    async def load(
        self,
        lora_name: str,
        lora_path: str,
        *,
        load_inplace: bool = False,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> Adapter:
        """Serve an adapter under a name, which requests give as their model; see `Adapters.load`."""
        body = LoadAdapterRequest(lora_name=lora_name, lora_path=lora_path, load_inplace=load_inplace).body()
        options = answer_options(Adapter, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return await self._client.post(_LOAD, cast_to=cast("type[Adapter]", object), body=body, options=options)

    async def unload(
        self,
        lora_name: str,
        *,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> AdapterUnloaded:
        """Serve an adapter no more; see `Adapters.unload`."""
        body = UnloadAdapterRequest(lora_name=lora_name).body()
        options = answer_options(AdapterUnloaded, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return await self._client.post(
            _UNLOAD, cast_to=cast("type[AdapterUnloaded]", object), body=body, options=options
        )


class AdaptersWithRawResponse:
    """`Adapters`, answering with HTTP responses."""

    def __init__(self, adapters: Adapters) -> None:
        self.load = _sdk.to_raw_response_wrapper(adapters.load)
        self.unload = _sdk.to_raw_response_wrapper(adapters.unload)


class AsyncAdaptersWithRawResponse:
    """`AsyncAdapters`, answering with HTTP responses."""

    def __init__(self, adapters: AsyncAdapters) -> None:
        self.load = _sdk.async_to_raw_response_wrapper(adapters.load)
        self.unload = _sdk.async_to_raw_response_wrapper(adapters.unload)


class AdaptersWithStreamingResponse:
    """`Adapters`, answering with unread HTTP responses."""

    def __init__(self, adapters: Adapters) -> None:
        self.load = _sdk.to_streamed_response_wrapper(adapters.load)
        self.unload = _sdk.to_streamed_response_wrapper(adapters.unload)


class AsyncAdaptersWithStreamingResponse:
    """`AsyncAdapters`, answering with unread HTTP responses."""

    def __init__(self, adapters: AsyncAdapters) -> None:
        self.load = _sdk.async_to_streamed_response_wrapper(adapters.load)
        self.unload = _sdk.async_to_streamed_response_wrapper(adapters.unload)
