"""Text to token ids and back, by the tokenizer of a served model."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, cast

from openai import not_given

from octavo_client import _sdk
from octavo_client.resources._root import Timeout, answer_options, root_url
from octavo_client.wire import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo

__all__ = ["AsyncTokens", "Tokens"]

_TOKENIZE = "/tokenize"
_DETOKENIZE = "/detokenize"


class Tokens:
    """POST /tokenize and /detokenize."""

    def __init__(self, client: "Octavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "TokensWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return TokensWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "TokensWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return TokensWithStreamingResponse(self)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Mapping[str, object]] | None = None,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        tools: Iterable[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        return_token_strs: bool | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> TokenizeResponse:
        """Turn a prompt, or chat messages, into token ids; `TokenizeRequest` describes the fields.

        Raises:
            pydantic.ValidationError: not exactly one of `prompt` and `messages` is given.
            openai.APIError: the request failed.
            InvalidAnswerError: the server is not Octavo's.
        """
        body = _tokenize_body(
            prompt=prompt,
            messages=messages,
            model=model,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            return_token_strs=return_token_strs,
        )
        return self._client.post(
            root_url(self._client.base_url, _TOKENIZE),
            cast_to=cast("type[TokenizeResponse]", object),
            body=body,
            options=answer_options(
                TokenizeResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )

    def detokenize(
        self,
        tokens: Iterable[int],
        *,
        model: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> DetokenizeResponse:
        """Turn token ids into text.

        Raises:
            pydantic.ValidationError: an id is negative or beyond 32 bits.
            openai.APIError: the request failed.
            InvalidAnswerError: the server is not Octavo's.
        """
        return self._client.post(
            root_url(self._client.base_url, _DETOKENIZE),
            cast_to=cast("type[DetokenizeResponse]", object),
            body=_detokenize_body(tokens, model=model),
            options=answer_options(
                DetokenizeResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )


class AsyncTokens:
    """POST /tokenize and /detokenize, awaited."""

    def __init__(self, client: "AsyncOctavo") -> None:
        self._client = client

    @cached_property
    def with_raw_response(self) -> "AsyncTokensWithRawResponse":
        """The same methods, answering with the HTTP response; its `parse()` gives the usual result."""
        return AsyncTokensWithRawResponse(self)

    @cached_property
    def with_streaming_response(self) -> "AsyncTokensWithStreamingResponse":
        """The same methods as context managers that leave the body unread."""
        return AsyncTokensWithStreamingResponse(self)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Mapping[str, object]] | None = None,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        tools: Iterable[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        return_token_strs: bool | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> TokenizeResponse:
        """Turn a prompt, or chat messages, into token ids; see `Tokens.tokenize`."""
        body = _tokenize_body(
            prompt=prompt,
            messages=messages,
            model=model,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            return_token_strs=return_token_strs,
        )
        return await self._client.post(
            root_url(self._client.base_url, _TOKENIZE),
            cast_to=cast("type[TokenizeResponse]", object),
            body=body,
            options=answer_options(
                TokenizeResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )

    async def detokenize(
        self,
        tokens: Iterable[int],
        *,
        model: str | None = None,
        extra_headers: _sdk.Headers | None = None,
        extra_query: _sdk.Query | None = None,
        timeout: Timeout = not_given,
    ) -> DetokenizeResponse:
        """Turn token ids into text; see `Tokens.detokenize`."""
        return await self._client.post(
            root_url(self._client.base_url, _DETOKENIZE),
            cast_to=cast("type[DetokenizeResponse]", object),
            body=_detokenize_body(tokens, model=model),
            options=answer_options(
                DetokenizeResponse, extra_headers=extra_headers, extra_query=extra_query, timeout=timeout
            ),
        )


class TokensWithRawResponse:
    """`Tokens`, answering with HTTP responses."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokenize = _sdk.to_raw_response_wrapper(tokens.tokenize)
        self.detokenize = _sdk.to_raw_response_wrapper(tokens.detokenize)


class AsyncTokensWithRawResponse:
    """`AsyncTokens`, answering with HTTP responses."""

    def __init__(self, tokens: AsyncTokens) -> None:
        self.tokenize = _sdk.async_to_raw_response_wrapper(tokens.tokenize)
        self.detokenize = _sdk.async_to_raw_response_wrapper(tokens.detokenize)


class TokensWithStreamingResponse:
    """`Tokens`, answering with unread HTTP responses."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokenize = _sdk.to_streamed_response_wrapper(tokens.tokenize)
        self.detokenize = _sdk.to_streamed_response_wrapper(tokens.detokenize)


class AsyncTokensWithStreamingResponse:
    """`AsyncTokens`, answering with unread HTTP responses."""

    def __init__(self, tokens: AsyncTokens) -> None:
        self.tokenize = _sdk.async_to_streamed_response_wrapper(tokens.tokenize)
        self.detokenize = _sdk.async_to_streamed_response_wrapper(tokens.detokenize)


def _tokenize_body(*, messages: Iterable[Mapping[str, object]] | None, **fields: object) -> dict[str, object]:
    given = {name: value for name, value in fields.items() if value is not None}
    if messages is not None:
        given["messages"] = [dict(message) for message in messages]
    return {**TokenizeRequest.model_validate(given)}


def _detokenize_body(tokens: Iterable[int], *, model: str | None) -> dict[str, object]:
    given: dict[str, object] = {"tokens": list(tokens)}
    if model is not None:
        given["model"] = model
    return {**DetokenizeRequest.model_validate(given)}
