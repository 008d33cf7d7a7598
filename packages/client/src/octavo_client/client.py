"""The two clients: openai's, pointed at an Octavo server, with Octavo's resources attached.

OpenAI's methods keep their signatures; Octavo's further fields travel as `extra_body=Extras(...)`, which the SDK
merges into the body because `Extras` answers as a mapping.

The SDK falls back on OPENAI_* variables for whatever is None. Here each of them is given a value before the SDK
looks, or taken back after, so that a secret meant for OpenAI reaches no other server.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import TypedDict, Unpack

import httpx2
import openai
from openai import DEFAULT_MAX_RETRIES, NotGiven, not_given

from octavo_client import _sdk
from octavo_client.errors import ConfigurationError
from octavo_client.resources.adapters import Adapters, AsyncAdapters
from octavo_client.resources.cache import AsyncCache, Cache
from octavo_client.resources.engine import AsyncEngineControl, EngineControl
from octavo_client.resources.ranking import AsyncRanking, Ranking
from octavo_client.resources.requests import AsyncRequests, Requests
from octavo_client.resources.server import AsyncServer, Server
from octavo_client.resources.tokens import AsyncTokens, Tokens
from octavo_client.sdk_clients import AsyncSdkClient, SdkClient
from octavo_client.with_response import (
    AsyncOctavoWithRawResponse,
    AsyncOctavoWithStreamingResponse,
    OctavoWithRawResponse,
    OctavoWithStreamingResponse,
)

__all__ = ["DEFAULT_BASE_URL", "AsyncOctavo", "Octavo", "SdkOptions"]

DEFAULT_BASE_URL = "http://localhost:8000/v1"

# Empty, not None: for None the SDK would look into the environment.
_UNSET = ""


class SdkOptions(TypedDict, total=False):
    """The SDK's further constructor options, as its `copy` passes them on.

    The first four are kept, or sent, as given. The next three configure access to OpenAI and its partners; a value
    other than None raises. Missing credentials are the server's to refuse, so the last has no effect.
    """

    organization: str | None
    project: str | None
    webhook_secret: str | None
    websocket_base_url: str | httpx2.URL | None
    admin_api_key: str | None
    workload_identity: object
    provider: object
    _enforce_credentials: bool


class Octavo(SdkClient):
    """A client of an Octavo server.

    `api_key`: the server's key, or a function that returns it before each request; by default OCTAVO_API_KEY, and
    without one no Authorization header is sent. `base_url`: the address that ends in /v1; by default OCTAVO_BASE_URL,
    else http://localhost:8000/v1. `timeout`: in seconds, by default 600 (5 to connect). `max_retries`: how often a
    request is sent again after a failed connection or status 408, 409, 429 or 5xx. `http_client`: an `httpx2.Client`.

    Raises:
        ConfigurationError: an argument or variable makes no sense.

    Example:
        >>> client = Octavo()
        >>> client.chat.completions.create(
        ...     model="smollm2",
        ...     messages=[{"role": "user", "content": "Hello"}],
        ...     extra_body=Extras(top_k=40),
        ... )
    """

    def __init__(
        self,
        *,
        api_key: str | Callable[[], str] | None = None,
        base_url: str | httpx2.URL | None = None,
        timeout: float | httpx2.Timeout | NotGiven | None = not_given,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: Mapping[str, str] | None = None,
        default_query: Mapping[str, object] | None = None,
        http_client: httpx2.Client | None = None,
        **sdk: Unpack[SdkOptions],
    ) -> None:
        _refuse_openai_access(sdk)
        super().__init__(
            api_key=_api_key_from_environment() if api_key is None else api_key,
            base_url=_checked_base_url(base_url),
            timeout=timeout,
            max_retries=_checked_max_retries(max_retries),
            default_headers=default_headers,
            default_query=default_query,
            http_client=http_client,
            admin_api_key=_UNSET,
            organization=_UNSET,
            project=_UNSET,
            webhook_secret=_UNSET,
            websocket_base_url=sdk.get("websocket_base_url"),
            _enforce_credentials=False,
        )
        _restore(self, default_headers, sdk)

    @cached_property
    def engine(self) -> EngineControl:
        """Put the engine to sleep, wake it, give it other weights; needs the admin key where there is one."""
        return EngineControl(self)

    @cached_property
    def adapters(self) -> Adapters:
        """Load, replace and unload adapters (LoRA); needs the admin key where there is one."""
        return Adapters(self)

    @cached_property
    def cache(self) -> Cache:
        """Prompts computed ahead, and prompts that stay in the prefix cache."""
        return Cache(self)

    @cached_property
    def ranking(self) -> Ranking:
        """Documents by how well they fit a query, and how alike texts are."""
        return Ranking(self)

    @cached_property
    def tokens(self) -> Tokens:
        """Tokenise and detokenise by the server's tokenizer."""
        return Tokens(self)

    @cached_property
    def requests(self) -> Requests:
        """What happened to requests; letting go of answers that are kept for forks."""
        return Requests(self)

    @cached_property
    def server(self) -> Server:
        """The server's health, readiness and version."""
        return Server(self)

    @cached_property
    def with_raw_response(self) -> OctavoWithRawResponse:
        """The same resources, answering with HTTP responses."""
        return OctavoWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> OctavoWithStreamingResponse:
        """The same resources, answering with unread HTTP responses."""
        return OctavoWithStreamingResponse(self)

    def _validate_headers(self, headers: _sdk.Headers, custom_headers: _sdk.Headers) -> None:
        """Let a request without credentials through: a server without a key needs none, another answers 401."""


class AsyncOctavo(AsyncSdkClient):
    """A client of an Octavo server whose methods are awaited.

    The arguments are those of `Octavo`; a function for `api_key` is async here, and `http_client` an
    `httpx2.AsyncClient`.

    Raises:
        ConfigurationError: an argument or variable makes no sense.
    """

    def __init__(
        self,
        *,
        api_key: str | Callable[[], Awaitable[str]] | None = None,
        base_url: str | httpx2.URL | None = None,
        timeout: float | httpx2.Timeout | NotGiven | None = not_given,
        max_retries: int = DEFAULT_MAX_RETRIES,
        default_headers: Mapping[str, str] | None = None,
        default_query: Mapping[str, object] | None = None,
        http_client: httpx2.AsyncClient | None = None,
        **sdk: Unpack[SdkOptions],
    ) -> None:
        _refuse_openai_access(sdk)
        super().__init__(
            api_key=_api_key_from_environment() if api_key is None else api_key,
            base_url=_checked_base_url(base_url),
            timeout=timeout,
            max_retries=_checked_max_retries(max_retries),
            default_headers=default_headers,
            default_query=default_query,
            http_client=http_client,
            admin_api_key=_UNSET,
            organization=_UNSET,
            project=_UNSET,
            webhook_secret=_UNSET,
            websocket_base_url=sdk.get("websocket_base_url"),
            _enforce_credentials=False,
        )
        _restore(self, default_headers, sdk)

    @cached_property
    def engine(self) -> AsyncEngineControl:
        """Put the engine to sleep, wake it, give it other weights; needs the admin key where there is one."""
        return AsyncEngineControl(self)

    @cached_property
    def adapters(self) -> AsyncAdapters:
        """Load, replace and unload adapters (LoRA); needs the admin key where there is one."""
        return AsyncAdapters(self)

    @cached_property
    def cache(self) -> AsyncCache:
        """Prompts computed ahead, and prompts that stay in the prefix cache."""
        return AsyncCache(self)

    @cached_property
    def ranking(self) -> AsyncRanking:
        """Documents by how well they fit a query, and how alike texts are."""
        return AsyncRanking(self)

    @cached_property
    def tokens(self) -> AsyncTokens:
        """Tokenise and detokenise by the server's tokenizer."""
        return AsyncTokens(self)

    @cached_property
    def requests(self) -> AsyncRequests:
        """What happened to requests; letting go of answers that are kept for forks."""
        return AsyncRequests(self)

    @cached_property
    def server(self) -> AsyncServer:
        """The server's health, readiness and version."""
        return AsyncServer(self)

    @cached_property
    def with_raw_response(self) -> AsyncOctavoWithRawResponse:
        """The same resources, answering with HTTP responses."""
        return AsyncOctavoWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> AsyncOctavoWithStreamingResponse:
        """The same resources, answering with unread HTTP responses."""
        return AsyncOctavoWithStreamingResponse(self)

    def _validate_headers(self, headers: _sdk.Headers, custom_headers: _sdk.Headers) -> None:
        """Let a request without credentials through: a server without a key needs none, another answers 401."""


def _api_key_from_environment() -> str:
    return os.environ.get("OCTAVO_API_KEY", _UNSET)


def _checked_base_url(given: str | httpx2.URL | None) -> httpx2.URL:
    name, value = "base_url", given
    if value is None:
        name, value = "OCTAVO_BASE_URL", os.environ.get("OCTAVO_BASE_URL") or DEFAULT_BASE_URL
    try:
        url = httpx2.URL(str(value))
    except httpx2.InvalidURL as error:
        raise ConfigurationError(f"{name} is no address ({error}); expected one like {DEFAULT_BASE_URL}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigurationError(f"{name} must be an http or https address like {DEFAULT_BASE_URL}, got {url!r}")
    if url.query or url.fragment:
        raise ConfigurationError(f"{name} takes no query or fragment, got {url!r}; give them as default_query")
    return url


def _checked_max_retries(max_retries: int) -> int:
    if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
        raise ConfigurationError(f"max_retries must be an integer of 0 or more, got {max_retries!r}")
    return max_retries


def _refuse_openai_access(sdk: SdkOptions) -> None:
    given = {
        "admin_api_key": sdk.get("admin_api_key"),
        "workload_identity": sdk.get("workload_identity"),
        "provider": sdk.get("provider"),
    }
    for name, value in given.items():
        if value is not None:
            raise ConfigurationError(f"{name} configures access to OpenAI; an Octavo server takes api_key and base_url")


def _restore(
    client: openai.OpenAI | openai.AsyncOpenAI, default_headers: Mapping[str, str] | None, sdk: SdkOptions
) -> None:
    """Undo what the SDK took from the environment, and the empty values that kept it from taking more."""
    client.admin_api_key = None
    client.organization = sdk.get("organization")
    client.project = sdk.get("project")
    client.webhook_secret = sdk.get("webhook_secret")
    # OPENAI_CUSTOM_HEADERS has no argument that would take its place: the SDK always merges it in.
    client._custom_headers = dict(default_headers or {})
    client._ambient_authorizations = frozenset()
