"""What the resources at the server's root share: their addresses, and the reading of their answers."""

from functools import partial
from typing import TypeVar

import httpx2
from openai import NotGiven, RequestOptions
from pydantic import BaseModel, ValidationError

from octavo_client._sdk import Headers, Query, make_request_options
from octavo_client.errors import InvalidAnswerError

Timeout = float | httpx2.Timeout | NotGiven | None
_AnswerT = TypeVar("_AnswerT", bound=BaseModel)


def root_url(base_url: httpx2.URL, path: str) -> str:
    """Return the address of a path beside `/v1`: http://host/prefix/v1/ and /health give http://host/prefix/health."""
    prefix = base_url.raw_path.decode("ascii").rstrip("/").removesuffix("/v1")
    return str(base_url.copy_with(raw_path=(prefix + path).encode("ascii")))


def answer_options(
    answer: type[BaseModel], *, extra_headers: Headers | None, extra_query: Query | None, timeout: Timeout
) -> RequestOptions:
    """Return the SDK's request options under which a JSON answer is read as `answer`, in raw responses too."""
    return make_request_options(
        extra_headers=extra_headers,
        extra_query=extra_query,
        timeout=timeout,
        post_parser=partial(_read, answer),
    )


def _read(answer: type[_AnswerT], data: object) -> _AnswerT:
    try:
        return answer.model_validate(data)
    except ValidationError as error:
        raise InvalidAnswerError(
            f"expected a JSON object that is a {answer.__name__}, got {_excerpt(data)}; does base_url name an Octavo "
            f"server? {error.error_count()} field(s) differ, the first: {error.errors()[0]['msg']}"
        ) from error


def _excerpt(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 200 else text[:200] + "..."
