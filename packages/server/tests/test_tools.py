"""Tools and reasoning in chats: what a model writes becomes calls, whole and streamed; what cannot be is one 400."""

import importlib.util
import json
from typing import Any

import pytest

from octavo_engine.text.answer_format import AnswerFormat

needs_grammars = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="demanded calls need the extra octavo-engine[structured]"
)
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str, parameters: Any = CITY, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS = [function("get_weather"), function("get_time", None)]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>{"name": "get_time"}</tool_call>'


def ask(client: Any, **body: Any) -> Any:
    response = client.post(CHAT, json={"messages": [USER], **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def stream(client: Any, **body: Any) -> list[Any]:
    response = client.post(CHAT, json={"messages": [USER], "stream": True, **body})
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def joined(chunks: list[Any]) -> tuple[dict[str, Any], str]:
    """Put a stream's message together as the openai SDK does; return it and its finish reason."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        delta = chunk["delta"]
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            assert call["index"] in (len(calls) - 1, len(calls))
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                assert call["function"]["arguments"] == ""
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    (reason,) = [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"] is not None]
    assert chunks[-1]["finish_reason"] == reason
    return message, reason


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    for call in message.get("tool_calls", ()):
        assert len(call.pop("id")) >= 9
    return message


def called(*calls: tuple[str, str], content: str | None = None, **fields: Any) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": name, "arguments": text}} for name, text in calls]
    return {
        "role": "assistant",
        "content": content,
        "refusal": None,
        **({"tool_calls": made} if made else {}),
        **fields,
    }


PARIS = ("get_weather", '{"city": "Paris"}')
ANSWERS = {
    "one call": (WEATHER, {}, called(PARIS), "tool_calls"),
    "two calls and text": (
        f"I look. {WEATHER}\n{TIME}",
        {},
        called(PARIS, ("get_time", "{}"), content="I look."),
        "tool_calls",
    ),
    "no parallel calls": (WEATHER + TIME, {"parallel_tool_calls": False}, called(PARIS), "tool_calls"),
    "no call": ("It rains.", {}, called(content="It rains."), "stop"),
    "cut off": (WEATHER, {"max_tokens": WEATHER.index('is"}')}, called(("get_weather", '{"city": "Par')), "length"),
    "none wanted": (WEATHER, {"tool_choice": "none"}, called(content=WEATHER), "stop"),
    "named": (
        '{"city": "Rome"}',
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        called(("get_weather", '{"city": "Rome"}')),
        "stop",
    ),
    "required": (
        '[{"name":"get_weather","arguments":{"city":"Rome"}}]',
        {"tool_choice": "required"},
        called(("get_weather", '{"city":"Rome"}')),
        "tool_calls",
    ),
    "reasoning and a call": (
        f"<think>\nhm\n</think>\n\n{WEATHER}",
        {},
        called(PARIS, reasoning_content="hm"),
        "tool_calls",
    ),
}


@pytest.fixture
def hermes(client, engine):
    """Let the engine's model write Hermes's calls, and think."""
    engine.text.answers = AnswerFormat.of("{{ tools }}<tool_call><think>")
    return client


@pytest.mark.parametrize("step", [1, 3, 100], ids=["a token at a time", "three", "at once"])
@pytest.mark.parametrize(
    ("reply", "body", "message", "reason"),
    [
        pytest.param(*answer, id=name, marks=[needs_grammars] if name in ("named", "required") else [])
        for name, answer in ANSWERS.items()
    ],
)
def test_an_answer_whole_and_streamed(hermes, engine, reply, body, message, reason, step):
    engine.replies, engine.step = [reply], step
    body = {"tools": TOOLS, **body}
    (choice,) = ask(hermes, **body)
    assert without_ids(choice["message"]) == message
    assert choice["finish_reason"] == reason
    streamed, streamed_reason = joined(stream(hermes, **body))
    assert without_ids(streamed) == message
    assert streamed_reason == reason


def test_reasoning_without_tools(hermes, engine):
    engine.replies = ["<think>hm</think>Paris."]
    (choice,) = ask(hermes)
    assert choice["message"] == called(content="Paris.", reasoning_content="hm")


def test_a_template_without_tools_is_told_of_them(client, engine):
    engine.replies = ['[{"name": "get_weather", "arguments": {"city": "Paris"}}]']
    engine.text.max_model_len = 1000
    (choice,) = ask(client, tools=TOOLS)
    assert without_ids(choice["message"]) == called(PARIS)
    prompt = bytes(engine.requests[-1].prompt_token_ids).decode()
    assert '"name": "get_weather"' in prompt
    ask(client, tools=TOOLS, tool_choice="none")
    assert "get_weather" not in bytes(engine.requests[-1].prompt_token_ids).decode()


@needs_grammars
def test_what_is_demanded_becomes_a_constraint(hermes, engine):
    engine.replies = ["{}"]
    ask(hermes, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    assert json.loads(engine.requests[-1].sampling.structured_outputs.json) == CITY
    ask(hermes, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    schema = json.loads(engine.requests[-1].sampling.structured_outputs.json)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    ask(hermes, tools=TOOLS)
    assert engine.requests[-1].sampling.structured_outputs is None
    ask(hermes, tools=[function("get_weather", strict=True)])
    tag = json.loads(engine.requests[-1].sampling.structured_outputs.structural_tag)
    assert tag["triggers"] == ["<tool_call>"]
    ask(hermes, tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
    assert engine.requests[-1].sampling.structured_outputs.json is not None


REFUSED = {
    "no tools": ({"tools": []}, "tools"),
    "not a list": ({"tools": "f"}, "tools"),
    "another type": ({"tools": [{"type": "code"}]}, "tools[0]"),
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "a name with spaces": ({"tools": [function("a b")]}, "tools[0].function.name"),
    "one name twice": ({"tools": [function("f"), function("f")]}, "tools"),
    "no schema": ({"tools": [function("f", "x")]}, "tools[0].function.parameters"),
    "strict is no truth": ({"tools": [function("f", strict="yes")]}, "tools[0].function.strict"),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "an unknown choice": ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
    "an unknown function": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
    ),
    "a bad schema": ({"tools": [function("f", {"type": "object", "not": {}})], "tool_choice": "required"}, "tools"),
    "a schema that nothing fits": (
        {"tools": [function("f", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})]}
        | {"tool_choice": "required"},
        "tools",
    ),
    "strict without a mark": ({"tools": [function("f", strict=True)]}, "tools"),
    "a format beside": ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tool_choice"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_one_400_that_names_it(client, engine, body, param):
    response = client.post(CHAT, json={"messages": [USER], **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []
