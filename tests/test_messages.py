"""Anthropic's own SDK against the server on the real model: whole, streamed, tools, counting, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from octavo_engine import AsyncEngine, EngineConfig
from octavo_server import create_app

anthropic = pytest.importorskip("anthropic", reason="the SDK is the package anthropic")

pytestmark = pytest.mark.model

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ONE = {"type": "any", "disable_parallel_tool_use": True}
GREEDY = {"temperature": 0.0}
TOOL: Any = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    engine = AsyncEngine.from_config(EngineConfig(max_model_len=1024, kv_cache_bytes=256 << 20))
    try:
        with TestClient(create_app(engine), base_url="http://testserver") as http:
            yield anthropic.Anthropic(base_url="http://testserver", api_key="none", http_client=http, max_retries=0)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def model(client: Any) -> str:
    return str(client.messages.create(model=None, max_tokens=1, messages=MESSAGES).model)


def test_a_stream_joins_to_the_whole_answer(client: Any, model: str) -> None:
    asked = {"model": model, "max_tokens": 12, "messages": MESSAGES, "extra_body": GREEDY}
    answer = client.messages.create(**asked)
    assert answer.content[0].text
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == answer.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (answer.stop_reason, answer.usage.output_tokens)


def test_a_demanded_tool_is_used(client: Any, model: str) -> None:
    asked = {"model": model, "max_tokens": 100, "messages": MESSAGES, "tools": [TOOL], "tool_choice": ONE}
    answer = client.messages.create(**asked, extra_body=GREEDY)
    use = answer.content[0]
    assert (use.type, use.name, answer.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert set(use.input) == {"city"}
    with client.messages.stream(**asked, extra_body=GREEDY) as stream:
        final = stream.get_final_message()
    assert [(b.name, b.input) for b in final.content] == [(b.name, b.input) for b in answer.content]


def test_tokens_are_counted(client: Any, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens
    usage = client.messages.create(model=model, max_tokens=1, messages=MESSAGES).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_are_the_sdks_own(client: Any, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="x", max_tokens=1, messages=MESSAGES)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(model=model, max_tokens=5000, messages=MESSAGES)
