"""Readings of calls in the forms that models write them: JSON objects, a name before JSON, Python calls."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from octavo_engine.text.parsers import json_text
from octavo_engine.text.parsers.events import CallArguments, CallBegin, Event
from octavo_engine.text.parsers.json_text import BadJson
from octavo_engine.text.parsers.reader import Reader, Reading

Out = Callable[[Event], None]

_ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "function")
_KEYS = frozenset((*_ARGUMENTS, *_NAMES, "type", "id"))


class NoCall(Exception):
    """What came is no call; `text` is what has been taken of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Recorder:
    """Notes what is read, until it is clear that it is a call."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, text: str) -> None:
        self.text += text


def json_calls(reader: Reader, out: Out, *, known: frozenset[str] | None = None) -> Reading[None]:
    """Read `{"name": ..., "arguments": {...}}`, or a list of such objects.

    Args:
        reader: stands before the call.
        out: is given what is found.
        known: names of functions; a call of any other is none. None takes all names.

    Raises:
        NoCall: for anything else, if nothing has been put out of it.
    """
    taken = Recorder()
    if (yield from reader.peek()) == "[":
        yield from _list(reader, taken, lambda: _object(reader, out, known, taken))
    else:
        yield from _object(reader, out, known, taken)


def _list(reader: Reader, taken: Recorder, one: Callable[[], Reading[None]]) -> Reading[None]:
    """Read a list in brackets; `one` reads an item."""
    taken((yield from reader.take()))
    while True:
        taken((yield from reader.skip_space()))
        if (yield from reader.skip("]")):
            return
        yield from one()
        taken.text = ""
        yield from reader.skip_space()
        yield from reader.skip(",")


def _object(reader: Reader, out: Out, known: frozenset[str] | None, taken: Recorder) -> Reading[None]:
    """Read one object; its arguments are put out as they come if its name came before them."""
    if (yield from reader.peek()) != "{":
        raise NoCall(taken.text)
    taken((yield from reader.take()))
    name: str | None = None
    arguments: str | None = None  # where they came before the name
    given = False
    try:
        while True:
            taken((yield from reader.skip_space()))
            character = yield from reader.peek()
            if character in ("}", ","):
                taken((yield from reader.take()))
                if character == "}":
                    break
                continue
            key = yield from _key(reader, taken)
            if known is not None and key not in _KEYS:
                raise NoCall(taken.text)  # an answer in JSON
            if key in _NAMES and name is None:
                name = yield from _name(reader, taken, known)
                if arguments is not None:
                    _put_whole(out, name, arguments)
                    given = True
            elif key in _ARGUMENTS and not given and arguments is None:
                if name is None:
                    arguments = yield from _recorded(reader, taken)
                else:
                    given = True
                    yield from _put_arguments(reader, out, name)
            else:
                yield from _recorded(reader, taken)
    except BadJson as error:
        if given:
            return
        raise NoCall(taken.text) from error
    if name is None:
        raise NoCall(taken.text)
    if not given:
        _put_whole(out, name, "{}")


def _key(reader: Reader, taken: Recorder) -> Reading[Any]:
    if (yield from reader.peek()) != '"':
        raise BadJson("a key was expected")
    key = json_text.loads((yield from _recorded(reader, taken)))
    taken((yield from reader.skip_space()))
    if not (yield from reader.skip(":")):
        raise BadJson("a colon was expected")
    taken(":")
    return key


def _name(reader: Reader, taken: Recorder, known: frozenset[str] | None) -> Reading[str]:
    name = json_text.loads((yield from _recorded(reader, taken)))
    if not isinstance(name, str) or not name or (known is not None and name not in known):
        raise BadJson("no name of a function")
    return name


def _recorded(reader: Reader, taken: Recorder) -> Reading[str]:
    """Read a value and note it."""
    own = Recorder()

    def both(text: str) -> None:
        own(text)
        taken(text)

    taken((yield from reader.skip_space()))
    yield from json_text.value(reader, both)
    return own.text


def _put_arguments(reader: Reader, out: Out, name: str) -> Reading[None]:
    """Put out a call whose arguments come next: as their own text, or the text in a string."""
    yield from reader.skip_space()
    out(CallBegin(name))
    first = yield from reader.peek()
    if first == "{":
        yield from json_text.value(reader, lambda text: out(CallArguments(text)))
        return
    own = Recorder()
    yield from json_text.value(reader, own)
    out(CallArguments(_as_object(own.text)))


def _put_whole(out: Out, name: str, arguments: str) -> None:
    out(CallBegin(name))
    out(CallArguments(_as_object(arguments)))


def _as_object(arguments: str) -> str:
    """Return arguments as the text of an object: some models write it once more in a string, or null for none."""
    value = json_text.loads(arguments)
    if isinstance(value, str):
        return value.strip() or "{}"
    return "{}" if value is None else arguments


def named_call(reader: Reader, out: Out, name: re.Pattern[str]) -> Reading[None]:
    """Read a call whose name stands before the JSON object of its arguments.

    Args:
        reader: stands before the name.
        out: is given what is found.
        name: finds the function's name, as its first group, in what comes before the object.

    Raises:
        NoCall: if no name or no object comes.
    """
    header = ""
    while (character := (yield from reader.peek())) and character != "{":
        header += yield from reader.take()
    found = name.search(header)
    if not character or found is None:
        raise NoCall(header)
    out(CallBegin(found.group(1)))
    try:
        yield from json_text.value(reader, lambda text: out(CallArguments(text)))
    except BadJson:
        return  # the text ended: what came of the arguments has been put out


def python_calls(reader: Reader, out: Out, *, known: frozenset[str] | None = None) -> Reading[None]:
    """Read `[f(a=1), g(b="x")]`; each call is put out when it has come as a whole.

    Raises:
        NoCall: for anything else, if nothing has been put out of it.
    """
    taken = Recorder()
    if (yield from reader.peek()) != "[":
        raise NoCall("")
    yield from _list(reader, taken, lambda: _python_call(reader, out, known, taken))


def _python_call(reader: Reader, out: Out, known: frozenset[str] | None, taken: Recorder) -> Reading[None]:
    start = len(taken.text)
    depth, quote = 0, ""
    while True:
        character = yield from reader.take()
        if not character:
            raise NoCall(taken.text)
        taken(character)
        if quote:
            if character == "\\":
                taken((yield from reader.take()))
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0:
                raise NoCall(taken.text)
            if depth == 0 and character == ")":
                break
        elif depth == 0 and not (character.isalnum() or character in "_.-"):
            raise NoCall(taken.text)
    name, arguments = _as_call(taken.text[start:], taken, known)
    out(CallBegin(name))
    out(CallArguments(json.dumps(arguments, ensure_ascii=False)))


def _as_call(source: str, taken: Recorder, known: frozenset[str] | None) -> tuple[str, dict[str, Any]]:
    name, _, rest = source.partition("(")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or (known is not None and name not in known):
            raise NoCall(taken.text)
        return name, {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, RecursionError, AssertionError) as error:
        raise NoCall(taken.text) from error


_JSON_NAMES = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal; JSON's own names are understood too."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(_literal(key)): _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{value!r} has no like in JSON")
    return value
