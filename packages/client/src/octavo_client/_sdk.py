"""The inner names of the openai SDK that this package builds on, gathered here so that a new SDK is checked once."""

from openai._base_client import make_request_options
from openai._client import (
    AsyncOpenAIWithRawResponse,
    AsyncOpenAIWithStreamedResponse,
    OpenAIWithRawResponse,
    OpenAIWithStreamedResponse,
)
from openai._legacy_response import async_to_raw_response_wrapper, to_raw_response_wrapper
from openai._response import async_to_streamed_response_wrapper, to_streamed_response_wrapper
from openai._types import Headers, Query

__all__ = [
    "AsyncOpenAIWithRawResponse",
    "AsyncOpenAIWithStreamedResponse",
    "Headers",
    "OpenAIWithRawResponse",
    "OpenAIWithStreamedResponse",
    "Query",
    "async_to_raw_response_wrapper",
    "async_to_streamed_response_wrapper",
    "make_request_options",
    "to_raw_response_wrapper",
    "to_streamed_response_wrapper",
]
