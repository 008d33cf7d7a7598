"""How a request body is read: content type, JSON, types, and the features that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from octavo_engine.errors import InvalidRequest
from octavo_server.errors import ApiError
from octavo_server.exchange import current_exchange
from octavo_server.protocol.violations import summarise

BODY_CONFIG = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
"""Of every request body: no coercion, no NaN. Unknown fields are kept only so that `refuse_unsupported` sees them."""

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_body(request: Request, model: type[ModelT]) -> ModelT:
    """Read and validate a JSON body, and hold the request to the `timeout` that it may have.

    Raises:
        ApiError: 415 if it is not JSON by its headers.
        pydantic.ValidationError: if it is not JSON, not an object, or a field is wrong.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(
            415, f"content-type must be application/json, got {summarise(media_type)}", code="unsupported_media_type"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(
            415,
            f"content-encoding must be identity, got {summarise(encoding)}; send the body uncompressed",
            code="unsupported_media_type",
        )
    body = model.model_validate_json(await request.body())
    exchange = current_exchange()
    if exchange is not None and (timeout := getattr(body, "timeout", None)) is not None:
        exchange.limit_time(timeout)
    return body


def refuse_unsupported(body: BaseModel, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that are known, and change the answer, but are not implemented.

    Args:
        body: a request body with the `BODY_CONFIG`.
        unsupported: field names, each with the values that change nothing; null never does.

    Raises:
        InvalidRequest: names the first such field.
    """
    given = body.model_extra or {}
    for name in unsupported:
        value = given.get(name)
        if value is not None and value not in unsupported[name]:
            raise InvalidRequest(
                f"{name} is not supported by this server, got {summarise(value)}; leave it out",
                param=name,
                code="unsupported_parameter",
            )
