"""Tools for models whose chat template knows none: they are told of in the conversation itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo_engine.errors import InvalidRequest

_TOLD = """You can call these functions, each given as JSON:
{tools}
To call functions, answer with nothing but a JSON list of calls: [{{"name": "...", "arguments": {{...}}}}]
Their results come as the next messages. If no function helps, answer in plain text."""


def tell_of_tools(
    messages: Sequence[Mapping[str, Any]], definitions: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return a conversation whose system message tells of functions, and whose calls and results are plain text.

    Args:
        messages: with `role` and `content`; not modified. What is none is left for the template to refuse.
        definitions: of the functions, in OpenAI's form; without any, calls and results alone become text.

    Raises:
        InvalidRequest: if a message has something else than calls in `tool_calls`.
    """
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    if not definitions:
        return plain
    told = _TOLD.format(
        tools="\n".join(json.dumps(one.get("function", one), ensure_ascii=False) for one in definitions)
    )
    first = plain[0] if plain else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        return [{**first, "content": _joined(first.get("content"), told, "\n\n")}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def makes_calls(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any message of a conversation holds calls."""
    return any(isinstance(message, Mapping) and message.get("tool_calls") for message in messages)


def _plain(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Return a message without fields for calls; those that it made are in its text."""
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise _no_call(index, calls)
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if calls:
        written = [_written(call, index) for call in calls]
        plain["content"] = _joined(plain.get("content"), json.dumps(written, ensure_ascii=False), "\n")
    return plain


def _joined(content: Any, text: str, between: str) -> Any:
    """Return content, a string or a list of parts, with text behind it."""
    if isinstance(content, list | tuple):
        return [*content, {"type": "text", "text": text}]
    return f"{content}{between}{text}" if content else text


def _written(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _no_call(index, call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # what is no JSON is repeated as it is
            arguments = json.loads(arguments)
    return {"name": function["name"], "arguments": arguments or {}}


def _no_call(index: int, given: Any) -> InvalidRequest:
    return InvalidRequest(
        f"messages[{index}].tool_calls must be a list of calls, each with a function that has a name, got {given!r}"[
            :200
        ],
        param="messages",
    )
