"""Checks of single sampling parameters; each raises InvalidRequest that names the parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from octavo_engine.errors import InvalidRequest


def check_int(name: str, value: Any, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """Refuse what is no integer in low .. high; `optional` lets None through."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {expected}, got {value}", param=name)


def check_float(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    """Refuse what is no finite number in low .. high; `low_open` refuses low itself."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", param=name)
    if value < low or value > high or (low_open and value == low):
        expected = f"above {low:g} and at most {high:g}" if low_open else f"between {low:g} and {high:g}"
        raise InvalidRequest(f"{name} must be {expected}, got {value:g}", param=name)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise InvalidRequest(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}", param=name)


def checked_list(name: str, value: Any, max_num_items: int) -> tuple[Any, ...]:
    """Return a list as a tuple; a single string is no list."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | set | frozenset):
        raise InvalidRequest(f"{name} must be a list, got {value!r}", param=name)
    if len(value) > max_num_items:
        raise InvalidRequest(f"{name} has {len(value)} items, at most {max_num_items} are taken", param=name)
    return tuple(value)


def checked_ids(name: str, value: Any, max_num_items: int) -> tuple[int, ...]:
    """Return a list of token ids as a tuple; whether they are in the vocabulary is for others to check."""
    token_ids = checked_list(name, value, max_num_items)
    for token_id in token_ids:
        check_int(name, token_id, 0)
    return token_ids


def checked_strings(name: str, value: Any, max_num_items: int) -> tuple[str, ...]:
    """Return a list of non-empty strings as a tuple."""
    strings = checked_list(name, value, max_num_items)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"{name} must hold non-empty strings, got {text!r}", param=name)
    return strings


def checked_bias(name: str, value: Any, limit: float, max_num_items: int) -> dict[int, float]:
    """Return what is added to the logits of token ids, each within -limit .. limit."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must map token ids to numbers, got {value!r}", param=name)
    if len(value) > max_num_items:
        raise InvalidRequest(f"{name} has {len(value)} items, at most {max_num_items} are taken", param=name)
    for token_id, bias in value.items():
        check_int(name, token_id, 0)
        check_float(name, bias, -limit, limit)
    return dict(value)
