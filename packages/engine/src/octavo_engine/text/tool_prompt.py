"""Tools for models whose chat template knows none: they are told of in the conversation itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_TOLD = """You can call these functions, each given as JSON:
{tools}
To call functions, answer with nothing but a JSON list of calls: [{{"name": "...", "arguments": {{...}}}}]
Their results come as the next messages. If no function helps, answer in plain text."""


def tell_of_tools(
    messages: Sequence[Mapping[str, Any]], definitions: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a conversation whose system message tells of functions, and whose calls and results are plain text.

    Args:
        messages: with `role` and `content`; not modified.
        definitions: of the functions, in OpenAI's form; without any, calls and results alone become text.
    """
    plain = [_plain(message) for message in messages]
    if not definitions:
        return plain
    told = _TOLD.format(
        tools="\n".join(json.dumps(one.get("function", one), ensure_ascii=False) for one in definitions)
    )
    if plain and plain[0]["role"] == "system":
        plain[0]["content"] = f"{plain[0]['content']}\n\n{told}"
        return plain
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without fields for calls; those that it made are in its text."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if calls:
        written = [{"name": call["name"], "arguments": _parsed(call.get("arguments"))} for call in calls]
        text = json.dumps(written, ensure_ascii=False)
        plain["content"] = f"{plain['content']}\n{text}" if plain.get("content") else text
    return plain


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
