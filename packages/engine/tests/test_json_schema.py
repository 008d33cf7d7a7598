"""The check of JSON Schemas before they are compiled: what is refused, and at which pointer."""

from __future__ import annotations

from typing import Any

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.structured import keywords
from octavo_engine.structured.json_schema import MAX_DEPTH, MAX_NUM_SCHEMAS, SchemaTree, simplified
from octavo_engine.structured.params import MAX_NUM_BYTES, StructuredOutputsParams

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED = {
    "an unsupported keyword": ({"properties": {"a": {"uniqueItems": True}}}, "/properties/a/uniqueItems"),
    "one behind a reference": ({"$ref": "#/$defs/x", "$defs": {"x": {"not": {}}}}, "/$defs/x/not"),
    "an escaped name": ({"properties": {"a/b~c": {"if": {}}}}, "/properties/a~1b~0c/if"),
    "no schema": ({"properties": {"foo": "bar"}}, "/properties/foo"),
    "a reference to nothing": ({"anyOf": [{}, {"$ref": "#/$defs/x"}]}, "/anyOf/1/$ref"),
    "a remote reference": ({"items": {"$ref": "https://example.com/x"}}, "/items/$ref"),
    "a reference to itself": ({"$ref": "#"}, "/$ref"),
    "a list that needs itself": ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "/items/$ref"),
    "an object that needs itself": (
        {"$ref": "#/$defs/node", "$defs": {"node": {**NODE, "required": ["next"]}}},
        "/$ref",
    ),
    "a prefix that needs itself": (
        {"type": "array", "minItems": 1, "prefixItems": [{"$ref": "#"}]},
        "/prefixItems/0/$ref",
    ),
    "all options endless": ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, "/$ref"),
    "draft 4's exclusive bound": ({"minimum": 1, "exclusiveMinimum": True}, "/exclusiveMinimum"),
    "items as a list": ({"items": [{}]}, "/items"),
    "required as a string": ({"required": "a"}, "/required"),
    "a multiple of many remainders": ({"items": {"multipleOf": 2 * 10.007}}, "/items/multipleOf"),
    "a depth without need": (nested(MAX_DEPTH + 1), "/items/items"),
    "many schemas": ({"properties": {str(i): {} for i in range(MAX_NUM_SCHEMAS)}}, "/properties/"),
}


@pytest.mark.parametrize(("schema", "pointer"), REFUSED.values(), ids=REFUSED.keys())
def test_a_schema_is_refused_at_the_keyword(schema: Any, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SchemaTree(schema)
    assert str(caught.value).startswith("JSON Schema at ")
    assert pointer in str(caught.value)
    assert caught.value.param == "structured_outputs"


ACCEPTED = {
    "anything": True,
    "recursion that may end": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "a list of itself": {"type": "array", "items": {"$ref": "#"}},
    "one option that ends": {"anyOf": [{"type": "null"}, {"type": "array", "minItems": 1, "items": {"$ref": "#"}}]},
    "a number instead": {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "unused definitions": {"$defs": {"x": {"not": {}}}, "type": "string"},
    "a keyword that restricts nothing": {"type": "array", "uniqueItems": False},
    "annotations and unknown keywords": {"title": "x", "discriminator": {}, "nullable": True},
    "multiples of few remainders": {"anyOf": [{"multipleOf": 999.9}, {"multipleOf": 1e9}, {"multipleOf": 1e-9}]},
    "depth": nested(MAX_DEPTH),
    "properties named like keywords": {"properties": {"not": {"type": "string"}, "if": {}}},
}


@pytest.mark.parametrize("schema", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_schema_is_accepted(schema: Any) -> None:
    SchemaTree(schema)


def test_every_keyword_is_supported_or_not() -> None:
    assert keywords.UNSUPPORTED.isdisjoint(keywords.SUPPORTED)
    for keyword in keywords.UNSUPPORTED:
        with pytest.raises(InvalidRequest, match=f"/items/\\{keyword}:" if keyword[0] == "$" else f"/items/{keyword}:"):
            SchemaTree({"items": {keyword: True}})


def test_a_harmless_value_of_an_unsupported_keyword_is_left_out() -> None:
    schema = {"items": {"uniqueItems": False, "type": "array"}, "enum": [{"a": [1]}]}
    assert simplified(schema) == {"items": {"type": "array"}, "enum": [{"a": [1]}]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"json": {}, "regex": "a"},
        {"json": False, "choice": ["a"]},
        {"json": 3},
        {"json": "[1]"},
        {"json": '{"a":'},
        {"json": '{"a":' * 100_000},
        {"json": {"minimum": float("nan")}},
        {"json": {"a": {1, 2}}},
        {"json": {"description": "x" * MAX_NUM_BYTES}},
        {"json": {"const": "\ud800"}},
        {"json_object": "yes"},
        {"regex": ""},
        {"regex": 7},
        {"regex": "a\0"},
        {"grammar": ""},
        {"choice": []},
        {"choice": "ab"},
        {"choice": ["a", ""]},
        {"choice": ["a", 1]},
        {"structural_tag": "{"},
        {"structural_tag": [1]},
        {"regex": "a", "whitespace_pattern": " "},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_contradictions_and_wrong_forms_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 400


def test_a_schema_is_kept_as_text_with_its_order() -> None:
    schema = {"properties": {"b": {}, "a": {}}}
    params = StructuredOutputsParams(json=schema)
    assert params.json == '{"properties":{"b":{},"a":{}}}'
    assert params == StructuredOutputsParams(json='{"properties": {"b": {}, "a": {}}}')
    assert hash(params) == hash(StructuredOutputsParams(json=schema))
    assert StructuredOutputsParams(json=False).json == "false"
