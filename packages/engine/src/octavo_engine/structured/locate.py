"""Finds the keyword of a JSON Schema that llguidance refuses, by compiling parts of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from octavo_engine.structured.json_schema import SchemaTree, rebased

_TIME_BUDGET = 1.0  # seconds for all tries
_HOME = "#/$defs/root"  # where the whole schema stands while a part of it is tried


def find_keyword(schema: Any, error_in: Callable[[Any], str | None]) -> tuple[str, str] | None:
    """Return the pointer of the innermost keyword that makes a schema fail, and the error that it gives.

    Args:
        schema: that has passed `SchemaTree`.
        error_in: compiles a schema; returns what is wrong with it, None if nothing is.

    Returns:
        None if no part fails by itself, or the time for the search is up.
    """
    stop = time.monotonic() + _TIME_BUDGET
    nodes = SchemaTree(schema).nodes
    moved = rebased(schema, _HOME)
    for pointer, node in reversed(nodes.items()):
        if time.monotonic() > stop:
            return None
        error = error_in({"$defs": {"root": moved}, "$ref": _HOME + pointer})
        if error is not None:
            return pointer + _keyword_in(node, moved, error, error_in, stop), error
    return None


def _keyword_in(node: Any, root: Any, error: str, error_in: Callable[[Any], str | None], stop: float) -> str:
    """Return "/keyword" for the one without which a failing schema is sound; "" if none is found before `stop`."""
    if not isinstance(node, Mapping):
        return ""
    for keyword in sorted(node, key=lambda name: name not in error):  # those that the error names come first
        if time.monotonic() > stop:
            break
        rest = {key: rebased(value, _HOME) for key, value in node.items() if key != keyword}
        if error_in({**rest, "$defs": {"root": root}}) is None:
            return f"/{keyword}"
    return ""
