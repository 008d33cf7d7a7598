"""The clients as they answer with HTTP responses: each of Octavo's resources in both ways that the SDK has."""

from functools import cached_property
from typing import TYPE_CHECKING

from octavo_client import _sdk
from octavo_client.resources.adapters import (
    AdaptersWithRawResponse,
    AdaptersWithStreamingResponse,
    AsyncAdaptersWithRawResponse,
    AsyncAdaptersWithStreamingResponse,
)
from octavo_client.resources.cache import (
    AsyncCacheWithRawResponse,
    AsyncCacheWithStreamingResponse,
    CacheWithRawResponse,
    CacheWithStreamingResponse,
)
from octavo_client.resources.engine import (
    AsyncEngineControlWithRawResponse,
    AsyncEngineControlWithStreamingResponse,
    EngineControlWithRawResponse,
    EngineControlWithStreamingResponse,
)
from octavo_client.resources.ranking import (
    AsyncRankingWithRawResponse,
    AsyncRankingWithStreamingResponse,
    RankingWithRawResponse,
    RankingWithStreamingResponse,
)
from octavo_client.resources.requests import (
    AsyncRequestsWithRawResponse,
    AsyncRequestsWithStreamingResponse,
    RequestsWithRawResponse,
    RequestsWithStreamingResponse,
)
from octavo_client.resources.server import (
    AsyncServerWithRawResponse,
    AsyncServerWithStreamingResponse,
    ServerWithRawResponse,
    ServerWithStreamingResponse,
)
from octavo_client.resources.tokens import (
    AsyncTokensWithRawResponse,
    AsyncTokensWithStreamingResponse,
    TokensWithRawResponse,
    TokensWithStreamingResponse,
)

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo


class OctavoWithRawResponse(_sdk.OpenAIWithRawResponse):
    """`Octavo`, answering with HTTP responses."""

    _client: "Octavo"

    @cached_property
    def engine(self) -> EngineControlWithRawResponse:
        """See `Octavo.engine`."""
        return self._client.engine.with_raw_response

    @cached_property
    def adapters(self) -> AdaptersWithRawResponse:
        """See `Octavo.adapters`."""
        return self._client.adapters.with_raw_response

    @cached_property
    def cache(self) -> CacheWithRawResponse:
        """See `Octavo.cache`."""
        return self._client.cache.with_raw_response

    @cached_property
    def ranking(self) -> RankingWithRawResponse:
        """See `Octavo.ranking`."""
        return self._client.ranking.with_raw_response

    @cached_property
    def tokens(self) -> TokensWithRawResponse:
        """See `Octavo.tokens`."""
        return self._client.tokens.with_raw_response

    @cached_property
    def requests(self) -> RequestsWithRawResponse:
        """See `Octavo.requests`."""
        return self._client.requests.with_raw_response

    @cached_property
    def server(self) -> ServerWithRawResponse:
        """See `Octavo.server`."""
        return self._client.server.with_raw_response


class AsyncOctavoWithRawResponse(_sdk.AsyncOpenAIWithRawResponse):
    """`AsyncOctavo`, answering with HTTP responses."""

    _client: "AsyncOctavo"

    @cached_property
    def engine(self) -> AsyncEngineControlWithRawResponse:
        """See `AsyncOctavo.engine`."""
        return self._client.engine.with_raw_response

    @cached_property
    def adapters(self) -> AsyncAdaptersWithRawResponse:
        """See `AsyncOctavo.adapters`."""
        return self._client.adapters.with_raw_response

    @cached_property
    def cache(self) -> AsyncCacheWithRawResponse:
        """See `AsyncOctavo.cache`."""
        return self._client.cache.with_raw_response

    @cached_property
    def ranking(self) -> AsyncRankingWithRawResponse:
        """See `AsyncOctavo.ranking`."""
        return self._client.ranking.with_raw_response

    @cached_property
    def tokens(self) -> AsyncTokensWithRawResponse:
        """See `AsyncOctavo.tokens`."""
        return self._client.tokens.with_raw_response

    @cached_property
    def requests(self) -> AsyncRequestsWithRawResponse:
        """See `AsyncOctavo.requests`."""
        return self._client.requests.with_raw_response

    @cached_property
    def server(self) -> AsyncServerWithRawResponse:
        """See `AsyncOctavo.server`."""
        return self._client.server.with_raw_response


class OctavoWithStreamingResponse(_sdk.OpenAIWithStreamedResponse):
    """`Octavo`, answering with unread HTTP responses."""

    _client: "Octavo"

    @cached_property
    def engine(self) -> EngineControlWithStreamingResponse:
        """See `Octavo.engine`."""
        return self._client.engine.with_streaming_response

    @cached_property
    def adapters(self) -> AdaptersWithStreamingResponse:
        """See `Octavo.adapters`."""
        return self._client.adapters.with_streaming_response

    @cached_property
    def cache(self) -> CacheWithStreamingResponse:
        """See `Octavo.cache`."""
        return self._client.cache.with_streaming_response

    @cached_property
    def ranking(self) -> RankingWithStreamingResponse:
        """See `Octavo.ranking`."""
        return self._client.ranking.with_streaming_response

    @cached_property
    def tokens(self) -> TokensWithStreamingResponse:
        """See `Octavo.tokens`."""
        return self._client.tokens.with_streaming_response

    @cached_property
    def requests(self) -> RequestsWithStreamingResponse:
        """See `Octavo.requests`."""
        return self._client.requests.with_streaming_response

    @cached_property
    def server(self) -> ServerWithStreamingResponse:
        """See `Octavo.server`."""
        return self._client.server.with_streaming_response


class AsyncOctavoWithStreamingResponse(_sdk.AsyncOpenAIWithStreamedResponse):
    """`AsyncOctavo`, answering with unread HTTP responses."""

    _client: "AsyncOctavo"

    @cached_property
    def engine(self) -> AsyncEngineControlWithStreamingResponse:
        """See `AsyncOctavo.engine`."""
        return self._client.engine.with_streaming_response

    @cached_property
    def adapters(self) -> AsyncAdaptersWithStreamingResponse:
        """See `AsyncOctavo.adapters`."""
        return self._client.adapters.with_streaming_response

    @cached_property
    def cache(self) -> AsyncCacheWithStreamingResponse:
        """See `AsyncOctavo.cache`."""
        return self._client.cache.with_streaming_response

    @cached_property
    def ranking(self) -> AsyncRankingWithStreamingResponse:
        """See `AsyncOctavo.ranking`."""
        return self._client.ranking.with_streaming_response

    @cached_property
    def tokens(self) -> AsyncTokensWithStreamingResponse:
        """See `AsyncOctavo.tokens`."""
        return self._client.tokens.with_streaming_response

    @cached_property
    def requests(self) -> AsyncRequestsWithStreamingResponse:
        """See `AsyncOctavo.requests`."""
        return self._client.requests.with_streaming_response

    @cached_property
    def server(self) -> AsyncServerWithStreamingResponse:
        """See `AsyncOctavo.server`."""
        return self._client.server.with_streaming_response
