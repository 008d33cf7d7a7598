"""Readings of JSON: a value as its own text while it comes, and one that is wanted as a whole."""

from __future__ import annotations

import json
from typing import Any

from octavo_engine.text.parsers.reader import Emit, Reader, Reading

_CLOSERS = {"{": "}", "[": "]"}
_ENDS_SCALAR = frozenset(",]}")


class BadJson(Exception):
    """The text is no JSON, or ends within it."""


def value(reader: Reader, emit: Emit) -> Reading[None]:
    """Read one JSON value and emit its text as it comes; white space before it is skipped.

    Only what says where the value ends is checked.

    Raises:
        BadJson: where the text ends within the value, or something else closes it.
    """
    yield from reader.skip_space()
    first = yield from reader.peek()
    if first in _CLOSERS:
        yield from _nested(reader, emit)
    elif first == '"':
        yield from _string(reader, emit)
    else:
        yield from _scalar(reader, emit)


def whole(reader: Reader) -> Reading[Any]:
    """Read one JSON value and return it.

    Raises:
        BadJson: if it is none.
    """
    parts: list[str] = []
    yield from value(reader, parts.append)
    return loads("".join(parts))


def loads(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        BadJson: if it is none.
    """
    try:
        return json.loads(text, strict=False)
    except ValueError as error:
        raise BadJson(str(error)) from error


def _nested(reader: Reader, emit: Emit) -> Reading[None]:
    open_brackets: list[str] = []
    while True:
        character = yield from reader.peek()
        if character == '"':
            yield from _string(reader, emit)
            continue
        if not character:
            raise BadJson("the text ends within a value")
        emit((yield from reader.take()))
        if character in _CLOSERS:
            open_brackets.append(_CLOSERS[character])
        elif character in "}]":
            if open_brackets.pop() != character:
                raise BadJson(f"{character} closes something else")
            if not open_brackets:
                return


def _string(reader: Reader, emit: Emit) -> Reading[None]:
    emit((yield from reader.take()))
    while True:
        character = yield from reader.take()
        if not character:
            raise BadJson("the text ends within a string")
        if character == "\\":
            character += yield from reader.take()
        emit(character)
        if character == '"':
            return


def _scalar(reader: Reader, emit: Emit) -> Reading[None]:
    taken = ""
    while (character := (yield from reader.peek())) and character not in _ENDS_SCALAR and not character.isspace():
        taken += yield from reader.take()
    if not taken:
        raise BadJson("a value was expected")
    emit(taken)
