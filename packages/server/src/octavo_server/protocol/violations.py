"""Says in one short line what is wrong with a request body that pydantic refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

_MAX_SHOWN = 3
_MAX_STRING_CHARS = 40


def describe_violations(error: ValidationError) -> tuple[str, str | None]:
    """Return a message about the first few mistakes, and the name of the first wrong field."""
    violations = error.errors(include_url=False)
    shown = [_describe(violation) for violation in violations[:_MAX_SHOWN]]
    if len(violations) > _MAX_SHOWN:
        shown.append(f"and {len(violations) - _MAX_SHOWN} more mistakes")
    return "; ".join(shown), field_name(violations[0]["loc"]) or None


def field_name(location: Sequence[int | str]) -> str:
    """Return a location as a path, such as `messages[0].role`."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_STRING_CHARS]}" if path else str(step)
    return path


def summarise(value: Any) -> str:
    """Return a value as it can stand in a message: long strings cut, containers described."""
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_STRING_CHARS else value[: _MAX_STRING_CHARS - 1] + "…")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} items"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return text if len(text := repr(value)) <= _MAX_STRING_CHARS else text[: _MAX_STRING_CHARS - 1] + "…"


def _describe(violation: Any) -> str:
    name, kind = field_name(violation["loc"]), violation["type"]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {violation['ctx']['error']}"
    if not name and kind == "model_type":
        return f"the body must be a JSON object, got {summarise(violation['input'])}"
    if kind == "missing":
        return f"{name} is required"
    text = violation["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if kind == "value_error":
        return f"{name}: {text}" if name else text
    return f"{name} {text[0].lower()}{text[1:]}, got {summarise(violation['input'])}"
