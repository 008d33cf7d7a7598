"""Tools on the real model over HTTP: what is demanded fits its schema, streamed and whole, with the openai SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from octavo_client import Octavo
from octavo_engine import AsyncEngine, EngineConfig
from octavo_server import create_app

pytestmark = pytest.mark.model

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 12}},
}
TIME = {
    "type": "object",
    "properties": {"zone": {"enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME}},
]
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}
MESSAGES: list[Any] = [{"role": "user", "content": "What will the weather in Paris be tomorrow?"}]
CHOICES = ["required", {"type": "function", "function": {"name": "get_time"}}]


@pytest.fixture(scope="module")
def client() -> Iterator[Octavo]:
    engine = AsyncEngine.from_config(EngineConfig(max_model_len=1024, kv_cache_bytes=256 << 20))
    try:
        with TestClient(create_app(engine), base_url="http://testserver/v1") as http:
            yield Octavo(base_url="http://testserver/v1", api_key="none", http_client=http)
    finally:
        engine.close()


@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named"])
@pytest.mark.parametrize("seed", range(3))
def test_a_demanded_call_fits_its_schema(client: Octavo, choice: Any, seed: int) -> None:
    asked = {"model": client.models.list().data[0].id, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}
    sampling = {"temperature": 1.0, "seed": seed, "max_tokens": 200}
    message = client.chat.completions.create(**asked, **sampling).choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    assert calls
    assert message.content is None
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    streamed: list[list[str]] = []
    for chunk in client.chat.completions.create(**asked, **sampling, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.index == len(streamed):
                streamed.append([call.function.name, ""])
            streamed[call.index][1] += call.function.arguments
    assert [tuple(call) for call in streamed] == calls


def test_results_of_calls_are_taken(client: Octavo) -> None:
    call = {"id": "call_12345", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    conversation = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_12345", "content": "12:30"},
    ]
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=conversation, tools=TOOLS, max_tokens=8)
    assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")
