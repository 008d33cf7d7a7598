"""response_format and structured_outputs: what reaches the engine, and what is refused and how."""

from typing import Any

import pytest

pytest.importorskip("llguidance", reason="structured output needs the extra octavo-engine[structured]")

from octavo_engine import StructuredOutputsParams

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}, "required": ["b"]}
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}
PATHS = {"/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": [USER]}}


def post(client: Any, path: str, **body: Any) -> Any:
    return client.post(path, json={**PATHS[path], **body})


WANTED = {
    "text": ({"response_format": {"type": "text"}}, None),
    "null": ({"response_format": None, "structured_outputs": None}, None),
    "json_object": ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"json": SCHEMA},
    ),
    "structural_tag": (
        {"response_format": {"type": "structural_tag", **TAG}},
        {"structural_tag": {"type": "structural_tag", **TAG}},
    ),
    "vllm json": ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    "vllm regex": ({"structured_outputs": {"regex": "a+", "choice": None}}, {"regex": "a+"}),
    "vllm choice": ({"structured_outputs": {"choice": ["x", "y"]}}, {"choice": ["x", "y"]}),
    "vllm grammar": ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    "beside text": (
        {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
        {"regex": "a"},
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("body", "wanted"), WANTED.values(), ids=WANTED.keys())
def test_the_constraint_reaches_the_engine(client, engine, path, body, wanted):
    response = post(client, path, **body)
    assert response.status_code == 200, response.text
    params = engine.requests[-1].sampling.structured_outputs
    assert params == (None if wanted is None else StructuredOutputsParams(**wanted))


@pytest.mark.parametrize("fields", [WANTED["json_schema"][0], WANTED["vllm json"][0]], ids=["openai", "vllm"])
def test_a_search_with_beams_is_held_to_it_too(client, engine, fields):
    response = post(client, "/v1/completions", use_beam_search=True, n=2, max_tokens=5, **fields)
    assert response.status_code == 200, response.text
    assert engine.requests[-1].beams is not None
    assert engine.requests[-1].sampling.structured_outputs == StructuredOutputsParams(json=SCHEMA)


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


REFUSED = {
    "no json_schema": ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be"),
    "no schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format",
        "json_schema must be",
    ),
    "schema 123": (schema_format(123), "response_format", "got 123"),
    "type sound": ({"response_format": {"type": "sound"}}, "response_format", "'sound'"),
    "no type": ({"response_format": {}}, "response_format", "type must be one of"),
    "a string": ({"response_format": "json"}, "response_format", "'json'"),
    "type hiccup": (schema_format({"type": "hiccup"}), "response_format", "at /type: Invalid type: hiccup"),
    "a property": (schema_format({"properties": {"foo": "bar"}}), "response_format", "at /properties/foo: "),
    "a keyword": (schema_format({"items": {"not": {}}}), "response_format", "at /items/not: "),
    "recursion": (schema_format({"$ref": "#"}), "response_format", "at /$ref: recursion"),
    "bad regex": ({"structured_outputs": {"regex": "["}}, "structured_outputs", "unclosed"),
    "bad grammar": ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "unknown name"),
    "empty grammar": ({"structured_outputs": {"grammar": ""}}, "structured_outputs", "non-empty"),
    "empty choice": ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least one"),
    "two kinds": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one of"),
    "no kind": ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    "a misspelt kind": ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "regexp"),
    "both fields": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "leave one out",
    ),
    "min_tokens": ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens", "contradicts"),
    "ignore_eos": ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "contradicts"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("body", "param", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_had_is_one_400_that_names_it(client, engine, body, param, message, stream):
    response = post(client, "/v1/chat/completions", stream=stream, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert engine.requests == []
    assert post(client, "/v1/chat/completions").status_code == 200  # the server lives on
