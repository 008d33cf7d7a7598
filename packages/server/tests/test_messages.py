"""Anthropic's messages: shapes, whole and streamed; tools, thinking, counting and errors."""

import importlib.util
import json
from typing import Any

import pytest

from octavo_engine.text.answer_format import AnswerFormat

MESSAGES = "/v1/messages"
USER = {"role": "user", "content": "hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Tells the weather.", "input_schema": CITY}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


def ask(client: Any, *messages: Any, **body: Any) -> Any:
    body = {"max_tokens": 100, "messages": list(messages or (USER,)), **body}
    response = client.post(MESSAGES, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: Any, **body: Any) -> list[dict[str, Any]]:
    response = client.post(MESSAGES, json={"max_tokens": 100, "messages": [USER], "stream": True, **body})
    assert response.status_code == 200, response.text
    events = []
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the blocks of a stream together as the SDK does, and check their order."""
    blocks: list[dict[str, Any]] = []
    is_open, inputs = False, ""
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            is_open, inputs = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                inputs += delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                blocks[-1][name] += delta[name]
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = json.loads(inputs)
    assert not is_open
    return blocks


def prompt_of(engine: Any) -> str:
    return bytes(engine.requests[-1].prompt_token_ids).decode()


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in block.items() if name != "id"} for block in blocks]


def test_a_message_has_anthropics_shape(client):
    answer = ask(client)
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "org/fake-model",
        "content": [{"type": "text", "text": " Paris."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("<user>hi\n<assistant>"),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 8,
        },
    }


def test_a_stream_has_anthropics_events(client):
    events = stream(client)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    assert joined(events) == [{"type": "text", "text": " Paris."}]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 8


@pytest.mark.parametrize(
    ("body", "reason", "sequence"),
    [
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["x", "ris", "y", "z", "."]}, "stop_sequence", "ris"),
    ],
    ids=["length", "a stop string"],
)
def test_why_it_ended(client, body, reason, sequence):
    answer = ask(client, **body)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert stream(client, **body)[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


@pytest.fixture
def hermes(client, engine):
    """Let the engine's model write Hermes's calls, and think."""
    engine.text.answers = AnswerFormat.of("<tool_call><think>")
    engine.text.max_model_len = 2000
    return client


@pytest.mark.parametrize("step", [1, 100], ids=["a token at a time", "at once"])
def test_thinking_text_and_calls_are_blocks(hermes, engine, step):
    engine.replies, engine.step = [f"<think>hm</think>I look. {CALL}{CALL}"], step
    use = {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    expected = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I look."}, use, use]
    answer = ask(hermes, tools=[TOOL], max_tokens=500)
    assert without_ids(answer["content"]) == expected
    assert answer["stop_reason"] == "tool_use"
    events = stream(hermes, tools=[TOOL], max_tokens=500)
    assert without_ids(joined(events)) == expected
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs octavo-engine[structured]")
def test_a_call_may_be_demanded(hermes, engine):
    engine.replies = ['{"city": "Rome"}']
    answer = ask(hermes, tools=[TOOL], tool_choice={"type": "tool", "name": "get_weather"})
    assert without_ids(answer["content"]) == [{"type": "tool_use", "name": "get_weather", "input": {"city": "Rome"}}]
    assert json.loads(engine.requests[-1].sampling.structured_outputs.json) == CITY
    ask(hermes, tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert json.loads(engine.requests[-1].sampling.structured_outputs.json)["maxItems"] == 1
    ask(hermes, tools=[TOOL], tool_choice={"type": "none"})
    assert engine.requests[-1].sampling.structured_outputs is None


def test_a_conversation_with_results_is_laid_out(client, engine):
    ask(
        client,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "so?"},
            ],
        },
        system=[{"type": "text", "text": "be brief"}],
        max_tokens=10,
    )
    called = '[{"name": "f", "arguments": {"x": 1}}]'
    assert prompt_of(engine) == f"<system>be brief\n<user>a\nb\n<assistant>{called}\n<tool>42\n<user>so?\n<assistant>"


def test_tokens_are_counted(client):
    response = client.post(f"{MESSAGES}/count_tokens", json={"messages": [USER], "system": "s"})
    assert response.json() == {"input_tokens": len("<system>s\n<user>hi\n<assistant>")}


REFUSED = {
    "no max_tokens": {"max_tokens": None},
    "no messages": {"messages": []},
    "another role": {"messages": [{"role": "system", "content": "x"}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
    "a call by the user": {"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
    "a call without input": {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
    "too warm": {"temperature": 1.5},
    "an empty stop": {"stop_sequences": [""]},
    "a server's tool": {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    "an unknown tool": {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
    "an unknown choice": {"tools": [TOOL], "tool_choice": {"type": "perhaps"}},
    "servers": {"mcp_servers": [{}]},
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_is_one_error_in_anthropics_shape(client, engine, body):
    response = client.post(MESSAGES, json={"max_tokens": 10, "messages": [USER], **body})
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"]
    assert engine.requests == []


def test_other_errors_have_their_type(client, engine):
    response = client.post(MESSAGES, json={"max_tokens": 10, "messages": [USER], "model": "x"})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    response = client.post(f"{MESSAGES}/else", json={})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    engine.fail_after = 2
    events = stream(client)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
