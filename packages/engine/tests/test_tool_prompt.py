"""Conversations that tell of tools in plain text, and what cannot be such a conversation."""

from __future__ import annotations

from typing import Any

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.text.tool_prompt import makes_calls, tell_of_tools

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def call(name: Any = "f", arguments: Any = '{"a": 1}') -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_system_message_tells_of_functions() -> None:
    told, user = tell_of_tools([USER], [TOOL])
    assert (told["role"], user) == ("system", USER)
    assert '{"name": "f", "parameters": {"type": "object"}}' in told["content"]
    system = {"role": "system", "content": "be brief"}
    first, _ = tell_of_tools([system, USER], [TOOL])
    assert first["content"] == f"be brief\n\n{told['content']}"
    parts = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    first, _ = tell_of_tools([parts, USER], [TOOL])
    assert first["content"] == [{"type": "text", "text": "be brief"}, {"type": "text", "text": told["content"]}]
    assert system["content"] == "be brief"


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, '{"a": 1}', '[{"name": "f", "arguments": {"a": 1}}]'),
        ("I look.", {"a": 1}, 'I look.\n[{"name": "f", "arguments": {"a": 1}}]'),
        ("", None, '[{"name": "f", "arguments": {}}]'),
        (None, "no JSON", '[{"name": "f", "arguments": "no JSON"}]'),
    ],
)
def test_calls_become_text(content: Any, arguments: Any, expected: str) -> None:
    message = {"role": "assistant", "content": content, "tool_calls": [call(arguments=arguments)]}
    result = {"role": "tool", "tool_call_id": "c", "content": "42"}
    assert makes_calls([USER, message])
    assert tell_of_tools([message, result], []) == [
        {"role": "assistant", "content": expected},
        {"role": "tool", "content": "42"},
    ]


@pytest.mark.parametrize("calls", ["x", {"a": 1}, [None], ["f"], [{}], [{"function": None}], [call(name=3)]], ids=str)
def test_what_is_no_call_is_refused(calls: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.tool_calls must be") as caught:
        tell_of_tools([USER, {"role": "assistant", "content": None, "tool_calls": calls}], [])
    assert caught.value.param == "messages"


def test_what_is_no_message_is_left_to_the_template() -> None:
    strange: list[Any] = ["x", {"content": "no role"}, None]
    assert not makes_calls(strange)
    assert tell_of_tools(strange, [TOOL])[1:] == strange
