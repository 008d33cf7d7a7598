"""The functions that a conversation may call: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`."""

from __future__ import annotations

import re
from typing import Any, Literal, NoReturn

from octavo_engine.errors import InvalidRequest
from octavo_engine.text.tool_use import Function, ToolUse
from octavo_server.protocol.violations import summarise

MAX_NUM_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}\Z")
_CHOICES = ("none", "auto", "required")
_ANYTHING = {"type": "object"}


def tool_use_of(tools: Any, tool_choice: Any, parallel: bool | None) -> ToolUse | None:
    """Return what a body says about functions; None if none may be called.

    Raises:
        InvalidRequest: names the field that is wrong.
    """
    if tools is None:
        if tool_choice not in (None, "none"):
            _refuse("tool_choice", "tool_choice goes with tools; give some or leave it out")
        return None
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_NUM_TOOLS:
        _refuse("tools", f"tools must be a list of 1 to {MAX_NUM_TOOLS} functions, got {summarise(tools)}")
    functions = tuple(_function(tool, f"tools[{place}]") for place, tool in enumerate(tools))
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        _refuse("tools", "tools holds two functions of one name; names must differ")
    choice, name = _choice(tool_choice, names)
    if choice == "none":
        return None
    return ToolUse(
        functions=functions, definitions=tuple(tools), choice=choice, name=name, parallel=parallel is not False
    )


def _function(tool: Any, where: str) -> Function:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        _refuse(where, f'{where} must be {{"type": "function", "function": {{...}}}}, got {summarise(tool)}')
    function = tool["function"]
    name, parameters, strict = function.get("name"), function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.match(name):
        _refuse(
            f"{where}.function.name",
            f"{where}.function.name must have 1 to 64 letters, digits or any of _.-, got {summarise(name)}",
        )
    if parameters is not None and not isinstance(parameters, dict):
        _refuse(
            f"{where}.function.parameters",
            f"{where}.function.parameters must be a JSON Schema of an object, got {summarise(parameters)}",
        )
    if strict is not None and not isinstance(strict, bool):
        _refuse(f"{where}.function.strict", f"{where}.function.strict must be true or false, got {summarise(strict)}")
    return Function(name, parameters or _ANYTHING, strict=bool(strict))


def _choice(given: Any, names: list[str]) -> tuple[Literal["none", "auto", "required", "named"], str | None]:
    if given is None:
        return "auto", None
    if isinstance(given, str) and given in _CHOICES:
        return given, None  # type: ignore[return-value]  # one of these three
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        _refuse(
            "tool_choice",
            f'tool_choice must be none, auto, required or {{"type": "function", "function": {{"name": ...}}}}, '
            f"got {summarise(given)}",
        )
    if name not in names:
        _refuse("tool_choice", f"tool_choice names {summarise(name)}, which is not among the tools")
    return "named", name


def _refuse(param: str, message: str) -> NoReturn:
    raise InvalidRequest(message, param=param)
