"""What the text of an answer must look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Any

from octavo_client.wire import StructuredOutputs
from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_server.protocol.violations import summarise

_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def constraint_of(response_format: Any, structured_outputs: StructuredOutputs | None) -> StructuredOutputsParams | None:
    """Return the constraint that either field asks for; None if neither does.

    Raises:
        InvalidRequest: if both do, or one is malformed; names the field.
    """
    constraint = _of_format(response_format)
    if structured_outputs is None:
        return constraint
    if constraint is not None:
        raise InvalidRequest(
            "structured_outputs and response_format both constrain the text; leave one out", param="structured_outputs"
        )
    fields: dict[str, Any] = structured_outputs.body()
    return StructuredOutputsParams(**{name: value for name, value in fields.items() if value is not None})


def _of_format(response_format: Any) -> StructuredOutputsParams | None:
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind not in _FORMATS:
        given = response_format if kind is None else kind
        raise InvalidRequest(
            f"response_format.type must be one of {', '.join(_FORMATS)}, got {summarise(given)}",
            param="response_format",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=response_format)
    return StructuredOutputsParams(json=_schema(response_format.get("json_schema")))


def _schema(json_schema: Any) -> dict[str, Any]:
    """Return the schema inside OpenAI's `json_schema`; the text is held to it whether `strict` is set or not."""
    schema = json_schema.get("schema") if isinstance(json_schema, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequest(
            "response_format.json_schema must be an object with a name and a schema, which is an object, got "
            f"{summarise(json_schema if schema is None else schema)}",
            param="response_format",
        )
    return schema
