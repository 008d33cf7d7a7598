"""How well texts fit a query, and how alike they are, by a served model's embeddings."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from openai import not_given

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options
from octavo_client.wire import Pooling
from octavo_client.wire_rerank import RerankRequest, RerankResponse, ScoreRequest, ScoreResponse

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncRanking", "Ranking"]


class Ranking:
    """POST /v1/rerank and /v1/score.

    A score is the cosine of two embeddings, as `score_type` of the answers says. Both methods raise
    `pydantic.ValidationError` for fields that cannot be, `openai.APIError` if the request failed, and
    `InvalidAnswerError` if the server is not Octavo's.

    Example:
        >>> found = Octavo().ranking.rerank("capital of France", ["Cats sleep.", "Paris is a city."], top_n=1)
        >>> found.results[0].index
        1
    """

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "RankingWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return RankingWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "RankingWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return RankingWithStreamingResponse(self)

    def rerank(
        self,
        query: str,
        documents: Sequence[str | Mapping[str, str]],
        *,
        top_n: int | None = None,
        return_documents: bool | None = None,
        model: str | None = None,
        pooling: Pooling | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> RerankResponse:
        """Return documents by how well they fit a query, best first; `RerankRequest` describes the fields."""
        body = _body(
            RerankRequest,
            query=query,
            documents=list(documents),
            top_n=top_n,
            return_documents=return_documents,
            model=model,
            pooling=pooling,
            truncate_prompt_tokens=truncate_prompt_tokens,
            priority=priority,
            cache_salt=cache_salt,
        )
        options = answer_options(RerankResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return self._client.post("/rerank", cast_to=cast("type[RerankResponse]", object), body=body, options=options)

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        model: str | None = None,
        pooling: Pooling | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> ScoreResponse:
        """Return how alike one text and each of several are, or pairs; `ScoreRequest` describes the fields."""
        body = _body(
            ScoreRequest,
            text_1=text_1,
            text_2=text_2,
            model=model,
            pooling=pooling,
            truncate_prompt_tokens=truncate_prompt_tokens,
            priority=priority,
            cache_salt=cache_salt,
        )
        options = answer_options(ScoreResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return self._client.post("/score", cast_to=cast("type[ScoreResponse]", object), body=body, options=options)


class AsyncRanking:
    """POST /v1/rerank and /v1/score, awaited; errors as in `Ranking`."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncRankingWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncRankingWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncRankingWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncRankingWithStreamingResponse(self)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str | Mapping[str, str]],
        *,
        top_n: int | None = None,
        return_documents: bool | None = None,
        model: str | None = None,
        pooling: Pooling | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> RerankResponse:
        """Return documents by how well they fit a query; see `Ranking.rerank`."""
        body = _body(
            RerankRequest,
            query=query,
            documents=list(documents),
            top_n=top_n,
            return_documents=return_documents,
            model=model,
            pooling=pooling,
            truncate_prompt_tokens=truncate_prompt_tokens,
            priority=priority,
            cache_salt=cache_salt,
        )
        options = answer_options(RerankResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return await self._client.post(
            "/rerank", cast_to=cast("type[RerankResponse]", object), body=body, options=options
        )

    async def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        model: str | None = None,
        pooling: Pooling | None = None,
        truncate_prompt_tokens: int | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> ScoreResponse:
        """Return how alike texts are; see `Ranking.score`."""
        body = _body(
            ScoreRequest,
            text_1=text_1,
            text_2=text_2,
            model=model,
            pooling=pooling,
            truncate_prompt_tokens=truncate_prompt_tokens,
            priority=priority,
            cache_salt=cache_salt,
        )
        options = answer_options(ScoreResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout)
        return await self._client.post(
            "/score", cast_to=cast("type[ScoreResponse]", object), body=body, options=options
        )


class RankingWithRawResponse:
    """`Ranking`, answering with HTTP responses."""

    def __init__(self, ranking: Ranking) -> None:
        self.rerank = _sdk.to_raw_response_wrapper(ranking.rerank)
        self.score = _sdk.to_raw_response_wrapper(ranking.score)


class AsyncRankingWithRawResponse:
    """`AsyncRanking`, answering with HTTP responses."""

    def __init__(self, ranking: AsyncRanking) -> None:
        self.rerank = _sdk.async_to_raw_response_wrapper(ranking.rerank)
        self.score = _sdk.async_to_raw_response_wrapper(ranking.score)


class RankingWithStreamingResponse:
    """`Ranking`, answering with unread HTTP responses."""

    def __init__(self, ranking: Ranking) -> None:
        self.rerank = _sdk.to_streamed_response_wrapper(ranking.rerank)
        self.score = _sdk.to_streamed_response_wrapper(ranking.score)


class AsyncRankingWithStreamingResponse:
    """`AsyncRanking`, answering with unread HTTP responses."""

    def __init__(self, ranking: AsyncRanking) -> None:
        self.rerank = _sdk.async_to_streamed_response_wrapper(ranking.rerank)
        self.score = _sdk.async_to_streamed_response_wrapper(ranking.score)


def _body(kind: type[RerankRequest] | type[ScoreRequest], **fields: object) -> dict[str, object]:
    return {**kind.model_validate({name: value for name, value in fields.items() if value is not None})}
