"""Items: what goes into a response as OpenAI's list of items, made whole, and laid out as a chat's messages."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.violations import summarise

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def input_items(given: Any) -> list[Item]:
    """Return a request's input as items, each with an id; references to stored items stay as they are.

    Raises:
        InvalidRequest: names what cannot be taken.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        _refuse("input", f"input must be a string or a list of items that is not empty, got {summarise(given)}")
    return [_item(item, f"input[{place}]") for place, item in enumerate(given)]


def chat_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return items as the messages of a chat; what a model thought in an earlier turn is not repeated to it."""
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item["type"]
        if kind == "message":
            texts = [part[_TEXTS[part["type"]]] for part in item["content"]]
            messages.append({"role": item["role"], "content": "\n".join(texts)})
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _output_text(item["output"])})
    return messages


def _item(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        _refuse(where, f"{where} must be an object, got {summarise(item)}")
    kind = item.get("type", "message" if "role" in item else "item_reference" if "id" in item else None)
    if kind == "message":
        return _message(item, where)
    if kind == "function_call":
        call = {name: _string(item, name, where) for name in ("call_id", "name", "arguments")}
        return {"id": _id(item, "fc"), "type": kind, "status": "completed"} | call
    if kind == "function_call_output":
        output = item.get("output")
        if not isinstance(output, str):
            output = _parts(output, f"{where}.output", "input_text")
        call_id = _string(item, "call_id", where)
        return {"id": _id(item, "fco"), "type": kind, "status": "completed", "call_id": call_id, "output": output}
    if kind == "reasoning":
        return item | {"id": _id(item, "rs"), "summary": item.get("summary") or []}
    if kind == "item_reference":
        return {"id": _string(item, "id", where), "type": kind}
    raise InvalidRequest(
        f"{where}.type must be message, function_call, function_call_output, reasoning or item_reference, got "
        f"{summarise(kind)}",
        param=where,
    )


def _message(item: Item, where: str) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        _refuse(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}, got {summarise(role)}")
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [_text_part(content, kind)] if isinstance(content, str) else _parts(content, f"{where}.content", kind)
    return {"id": _id(item, "msg"), "type": "message", "status": "completed", "role": role, "content": parts}


def _parts(parts: Any, where: str, kind: str) -> list[dict[str, Any]]:
    if not isinstance(parts, list):
        _refuse(where, f"{where} must be a string or a list of parts, got {summarise(parts)}")
    texts = []
    for place, part in enumerate(parts):
        given = part.get("type") if isinstance(part, dict) else None
        name = _TEXTS.get(given) if isinstance(given, str) else None
        if name is None or not isinstance(part.get(name), str):
            _refuse(
                f"{where}[{place}]",
                f"{where}[{place}] must be text, which is all this model takes, got {summarise(given)}",
            )
        texts.append(part if given == "refusal" else _text_part(part[name], kind))
    return texts


def _text_part(text: str, kind: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": []} if kind == "output_text" else {})


def _output_text(output: str | list[dict[str, Any]]) -> str:
    return output if isinstance(output, str) else "\n".join(part[_TEXTS[part["type"]]] for part in output)


def _string(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        _refuse(f"{where}.{name}", f"{where}.{name} must be a string, got {summarise(value)}")
    return value


def _id(item: Item, prefix: str) -> str:
    given = item.get("id")
    return given if isinstance(given, str) and given else f"{prefix}_{uuid.uuid4().hex}"


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequest(message, param=param)
