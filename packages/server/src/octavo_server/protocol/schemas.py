"""JSON Schemas of fields that are read by hand, for errors that say more than a union of types can."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

_TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOKEN_IDS = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_STOP = {"type": "array", "items": _TEXT, "maxItems": 4}
_NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_OBJECT = {"type": "object"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _NAME, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "type", "function"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _NAME, "description": {"type": "string"}, "parameters": _OBJECT},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": _NAME}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
_FORMATS = [
    {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
    {
        "type": "object",
        "properties": {
            "type": {"const": "json_schema"},
            "json_schema": {"type": "object", "properties": {"schema": _OBJECT}, "required": ["schema"]},
        },
        "required": ["type", "json_schema"],
    },
    {
        "type": "object",
        "properties": {
            "type": {"const": "structural_tag"},
            "structures": {"type": "array", "items": _OBJECT},
            "triggers": _TEXTS,
        },
        "required": ["type", "structures", "triggers"],
    },
]
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": _PART}]},
        "tool_calls": {"type": "array", "items": _CALL},
        "tool_call_id": {"type": "string"},
    },
    "required": ["role", "content"],
}


def _or_null(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*schemas, {"type": "null"}], "default": None})


PromptField = Annotated[
    Any,
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS, "minItems": 1}]}),
]
StopField = Annotated[Any, _or_null(_TEXT, _STOP)]
FormatField = Annotated[Any, _or_null(*_FORMATS)]
ToolsField = Annotated[Any, _or_null({"type": "array", "items": _TOOL, "minItems": 1})]
ToolChoiceField = Annotated[Any, _or_null({"enum": ["none", "auto", "required"]}, _NAMED)]
ChatMessages = Annotated[list[dict[str, Any]], WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1})]
