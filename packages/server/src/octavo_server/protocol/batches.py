"""The body of POST /v1/batches, and the lines of a batch's input file."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.body import BODY_CONFIG
from octavo_server.protocol.metadata import Metadata
from octavo_server.protocol.violations import summarise

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")

_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_MAX_ID_CHARS = 512


class OutputExpiry(BaseModel):
    """When the files that a batch makes are deleted."""

    model_config = BODY_CONFIG

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=30 * 24 * 3600)


class BatchBody(BaseModel):
    """OpenAI's fields of a batch."""

    model_config = BODY_CONFIG

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None

    def check(self) -> None:
        """Check what a type does not say.

        Raises:
            InvalidRequest: names the field.
        """
        if self.endpoint not in ENDPOINTS:
            raise InvalidRequest(
                f"endpoint must be one of {', '.join(ENDPOINTS)}, got {summarise(self.endpoint)}", param="endpoint"
            )

    @property
    def window_seconds(self) -> int:
        """The seconds within which a batch must be done.

        Raises:
            InvalidRequest: if it is no time.
        """
        if (match := _WINDOW.fullmatch(self.completion_window)) is None:
            raise InvalidRequest(
                f"completion_window must be a time such as 24h, got {summarise(self.completion_window)}",
                param="completion_window",
            )
        return int(match[1]) * _SECONDS[match[2]]


class LineError(NamedTuple):
    """What is wrong with a line of an input file."""

    code: str
    message: str
    param: str | None = None


def custom_id_of(raw: bytes, endpoint: str) -> str | LineError:
    """Return the name that a line of an input file gives to its request, or what is wrong with the line."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return LineError("invalid_json_line", "this line is not valid JSON; each line must be one JSON object")
    if not isinstance(line, dict):
        return LineError("invalid_json_line", f"this line must be a JSON object, got {summarise(line)}")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_ID_CHARS or not _is_text(custom_id):
        message = f"custom_id must be a string of 1 to {_MAX_ID_CHARS} characters, got {summarise(custom_id)}"
        return LineError("invalid_custom_id", message, "custom_id")
    for name, expected, code in (("method", "POST", "invalid_method"), ("url", endpoint, "mismatched_url")):
        if line.get(name) != expected:
            return LineError(code, f"{name} must be {expected}, got {summarise(line.get(name))}", name)
    if not isinstance(line.get("body"), dict):
        return LineError("invalid_body", f"body must be an object, got {summarise(line.get('body'))}", "body")
    return custom_id


def request_body(raw: bytes, endpoint: str, priority: int) -> bytes:
    """Return the body of a line's request as it is asked: behind those that a client waits for.

    Args:
        raw: the line, which `custom_id_of` has accepted.
        endpoint: the batch's.
        priority: the lowest one that it may have; lower runs earlier.

    Raises:
        InvalidRequest: if it asks for what a batch cannot do.
    """
    body: dict[str, Any] = json.loads(raw)["body"]
    for name in ("stream", "background"):
        if body.get(name):
            raise InvalidRequest(f"{name} does not go with batches; leave it out", param=name)
    if endpoint != "/v1/embeddings":
        given = body.get("priority")
        if given is None or (type(given) is int and given < priority):
            body["priority"] = priority
    return json.dumps(body).encode()


def _is_text(value: str) -> bool:
    """Return whether a string can be encoded: JSON may hold halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
