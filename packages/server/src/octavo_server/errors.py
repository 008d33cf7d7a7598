"""What goes wrong, as HTTP: one table from exceptions to statuses, and OpenAI's error body.

    Exception
    └── ApiError    an answer that is an error: status, message, type, param, code, headers

The engine's own errors stay as they are; `to_api_error` looks them up in `ERRORS`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from octavo_engine.errors import (
    EngineAsleep,
    EngineBusy,
    EngineDead,
    EngineError,
    EngineInUse,
    EngineStuck,
    IncompatibleWeights,
    InvalidAdapter,
    InvalidRequest,
    RequestFailed,
    RequestLost,
    UnknownAdapter,
    UnknownPin,
)
from octavo_server.protocol.violations import describe_violations
from octavo_server.store.database import StoreFailed

_log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 2000
CLIENT_GONE = 499
"""The status that metrics and logs show for a request whose client left; it never reaches anyone."""

_INVALID, _SERVER = "invalid_request_error", "server_error"


_MESSAGE_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_MESSAGES = "/v1/messages"

# text-generation-inference's routes, its words for errors, and where its statuses are others.
_GENERATE = frozenset({"/", "/generate", "/generate_stream"})
_GENERATE_TYPES = {400: "validation", 404: "not_found", 422: "validation", 429: "overloaded", 503: "overloaded"}
_GENERATE_STATUSES = {400: 422}


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    Args:
        status: the HTTP status.
        message: what was expected, what came, and what to do.
        type: OpenAI's word for the family of the error.
        param: the request's field that is wrong; None if it is no single one.
        code: a machine-readable word; None if there is none.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = _INVALID,  # noqa: A002  # the wire's name
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def message_body(self) -> dict[str, Any]:
        """Return the JSON body in Anthropic's shape."""
        kind = _MESSAGE_TYPES.get(self.status, "api_error" if self.status >= 500 else _INVALID)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def tgi_body(self) -> dict[str, Any]:
        """Return the JSON body in the shape of text-generation-inference."""
        kind = "generation" if self.status >= 500 else self.code or self.type
        return {"error": self.message, "error_type": _GENERATE_TYPES.get(self.status, kind)}

    def body(self) -> dict[str, Any]:
        """Return the JSON body; all four keys are always there."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ErrorRow(NamedTuple):
    """How one kind of exception is answered; `message` None passes the exception's own text on."""

    status: int
    type: str
    code: str | None = None
    message: str | None = None
    headers: Mapping[str, str] = {}


ERRORS: Mapping[type[Exception], ErrorRow] = {
    InvalidRequest: ErrorRow(400, _INVALID),
    UnknownPin: ErrorRow(404, _INVALID),
    UnknownAdapter: ErrorRow(404, _INVALID),
    ClientDisconnect: ErrorRow(CLIENT_GONE, _INVALID, "client_gone", "the client closed the connection"),
    IncompatibleWeights: ErrorRow(400, _INVALID, "incompatible_weights"),
    EngineInUse: ErrorRow(409, _INVALID, "engine_in_use", None, {"x-should-retry": "false"}),
    EngineAsleep: ErrorRow(503, _SERVER, "engine_asleep", None, {"retry-after": "30"}),
    # The texts of these may quote the machine's files, so they go to the log and not to the client.
    InvalidAdapter: ErrorRow(
        500, _SERVER, None, "the adapter's files could not be read again; the server's log says more"
    ),
    RequestFailed: ErrorRow(500, _SERVER, "request_failed", "the engine could not compute this request"),
    RequestLost: ErrorRow(
        503,
        _SERVER,
        "request_lost",
        "a part of the model was lost while this was computed; send it again",
        {"retry-after": "10"},
    ),
    EngineBusy: ErrorRow(503, _SERVER, "engine_busy", None, {"retry-after": "5"}),
    EngineStuck: ErrorRow(503, _SERVER, "engine_stuck", None, {"retry-after": "10"}),
    EngineDead: ErrorRow(
        503, _SERVER, "engine_dead", "the engine has stopped and serves no requests", {"retry-after": "10"}
    ),
    StoreFailed: ErrorRow(500, _SERVER, "store_failed", "the server could not read or write what it keeps"),
    EngineError: ErrorRow(500, _SERVER, "engine_error", "the engine could not serve this request"),
    Exception: ErrorRow(500, _SERVER, "internal_error", "the server failed; its log says more"),
}

_HTTP_MESSAGES = {
    404: ("not_found", "there is no route {method} {path}"),
    405: ("method_not_allowed", "{path} does not take {method}; see the allow header"),
}


def to_api_error(error: Exception) -> ApiError:
    """Return how an exception is answered; anything unforeseen is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        message, param = describe_violations(error)
        return ApiError(400, message, param=param)
    row = next(ERRORS[cls] for cls in type(error).__mro__ if cls in ERRORS)
    if row.status >= 500:
        traced = error if row is ERRORS[Exception] else None
        _log.error("answered %d: %s: %s", row.status, type(error).__name__, error, exc_info=traced)
    return ApiError(
        row.status,
        str(error) if row.message is None else row.message,
        type=row.type,
        param=getattr(error, "param", None),
        code=getattr(error, "code", None) or row.code,
        headers=row.headers,
    )


def error_response(error: Exception, path: str = "") -> JSONResponse:
    """Return an exception as a response in OpenAI's shape, or in that of the interface which a path belongs to."""
    api_error = to_api_error(error)
    if path in _GENERATE:
        status = _GENERATE_STATUSES.get(api_error.status, api_error.status)
        return JSONResponse(api_error.tgi_body(), status, headers=api_error.headers)
    body = api_error.message_body() if path.startswith(_MESSAGES) else api_error.body()
    return JSONResponse(body, api_error.status, headers=api_error.headers)


async def handle_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an exception that a route raised."""
    return error_response(error, request.url.path)


async def handle_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer what the framework itself refuses: an unknown route or a wrong method."""
    assert isinstance(error, HTTPException)
    code, template = _HTTP_MESSAGES.get(error.status_code, (None, str(error.detail)))
    message = template.format(method=request.method, path=request.url.path[:200]) if code else template
    api_error = ApiError(error.status_code, message, code=code, headers=error.headers)
    return error_response(api_error, request.url.path)
