"""Checks of single sampling parameters; each raises InvalidRequest that names the parameter."""

from __future__ import annotations

import math

from octavo_engine.errors import InvalidRequest


def check_int(name: str, value: int | None, low: int, high: int | None) -> None:
    if value is None and name in {"seed", "max_tokens", "logprobs"}:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {expected}, got {value}", param=name)


def check_float(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", param=name)
    if value < low or value > high or (low_open and value == low):
        expected = f"above {low:g} and at most {high:g}" if low_open else f"between {low:g} and {high:g}"
        raise InvalidRequest(f"{name} must be {expected}, got {value:g}", param=name)
