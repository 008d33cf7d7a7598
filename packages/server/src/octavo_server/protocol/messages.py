"""The bodies of Anthropic's POST /v1/messages and /v1/messages/count_tokens, as conversations in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from pydantic import BaseModel, Field

from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.body import BODY_CONFIG, refuse_unsupported
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.generation import MAX_INT32
from octavo_server.protocol.violations import summarise

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],), "output_format": ()}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_SAMPLING = ("temperature", "top_p", "top_k")


class CountBody(BaseModel):
    """A conversation and the tools that may be used in it."""

    model_config = BODY_CONFIG

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: Any = None
    tools: Any = None
    tool_choice: Any = None

    def conversation(self) -> dict[str, Any]:
        """Return messages, tools and the choice among them as the body of a chat has them.

        Raises:
            InvalidRequest: names what cannot be taken.
        """
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system, "system")}]
        for place, message in enumerate(self.messages):
            messages += _messages(message, f"messages[{place}]")
        chat: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            chat["tools"] = _tools(self.tools)
            chat |= _tool_choice(self.tool_choice)
        return chat


class MessagesBody(CountBody):
    """Anthropic's fields of a message."""

    max_tokens: int = Field(ge=1, le=MAX_INT32)
    temperature: float | None = Field(default=None, ge=0.0, le=1.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, le=MAX_INT32)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: dict[str, Any] | None = None

    def chat(self) -> ChatBody:
        """Return the same as a chat.

        Raises:
            InvalidRequest: names what cannot be taken.
        """
        refuse_unsupported(self, _UNSUPPORTED)
        if any(not stop for stop in self.stop_sequences or ()):
            _refuse("stop_sequences", "stop_sequences must hold non-empty strings")
        fields = self.conversation() | {"max_tokens": self.max_tokens, "stream": self.stream}
        fields |= {name: getattr(self, name) for name in _SAMPLING}
        if (self.thinking or {}).get("type") == "disabled":
            fields["chat_template_kwargs"] = {"enable_thinking": False}
        chat = _Chat.model_validate(fields | {"stop": self.stop_sequences})
        chat.check()
        return chat


class _Chat(ChatBody):
    """A chat with as many stop strings as there are."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _messages(message: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Return what one message holds: results of calls are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        _refuse(f"{where}.role", f"{where}.role must be user or assistant, got {summarise(role)}")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        _refuse(f"{where}.content", f"{where}.content must be a string or a list of blocks, got {summarise(content)}")
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(content):
        at = f"{where}.content[{place}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text([block], at))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block, at))
        elif kind == "tool_result" and role == "user":
            text = _text(block.get("content") or "", at)
            yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": text}
        elif kind not in ("thinking", "redacted_thinking"):  # what was thought before is not repeated to the model
            _refuse(at, f"{at} must be text, or a tool's use or result from whose role it is, got {summarise(kind)}")
    if texts or calls:
        yield {"role": role, "content": "\n".join(texts)} | ({"tool_calls": calls} if calls else {})


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for block in content if isinstance(content, list) else [content]:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            _refuse(where, f"{where} must be text or blocks of type text, got {summarise(block)}")
        texts.append(block["text"])
    return "\n".join(texts)


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        _refuse(where, f"{where} must have a name and an input, which is an object")
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": str(block.get("id")), "type": "function", "function": function}


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        _refuse("tools", f"tools must be a list, got {summarise(tools)}")
    functions = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            _refuse(f"tools[{place}]", f"tools[{place}] must be a tool of the caller's own, got {summarise(tool)}")
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        if tool.get("description"):
            function["description"] = tool["description"]
        functions.append({"type": "function", "function": function})
    return functions


def _tool_choice(choice: Any) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type") if isinstance(choice, dict) else None
    fields: dict[str, Any] = {}
    if kind == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _CHOICES:
        fields["tool_choice"] = _CHOICES[kind]
    else:
        _refuse("tool_choice", f"tool_choice.type must be auto, any, tool or none, got {summarise(kind)}")
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequest(message, param=param)
