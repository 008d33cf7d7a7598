"""ChatTemplate: a model's Jinja template, rendered in a sandbox with what Transformers gives such templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo_engine.errors import CorruptModelFile, InvalidRequest

_RESERVED = frozenset(("messages", "tools", "add_generation_prompt"))
_PROBE = "octavo-probe"


class ChatTemplate:
    """A chat template, compiled once; `render` may be called from several threads.

    The template comes with the model and is not trusted: it runs in Jinja's immutable sandbox on plain JSON data.

    Args:
        source: The template's text.
        special_tokens: Spellings by name (`bos_token`, ...), which templates use as variables.

    Raises:
        CorruptModelFile: if the template has a syntax error; names the line.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CorruptModelFile(f"chat template, line {error.lineno}: {error.message}") from error
        self.takes_parts = self._probe_parts()

    def _probe_parts(self) -> bool:
        """Find out whether the template itself handles content that is a list of parts, by trying it."""
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        try:
            text = self._render([message], None, True, {})
        except InvalidRequest:
            return False
        # A template for strings that gets a list either fails, drops it, or prints it as a Python list.
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: Objects with `role` and `content`, plain JSON data; not modified. Content may be a string or a
                list of parts; for a template that takes strings only, the text parts are joined by line breaks.
                A tool call's `arguments` may be an object or its JSON text.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: Whether the prompt ends with the header of the answer.
            kwargs: Further variables for the template; they go before special tokens of the same name.

        Raises:
            InvalidRequest: if the template refuses the conversation or cannot handle it, or a part is no text.
        """
        for name in _RESERVED & kwargs.keys():
            raise InvalidRequest(f"chat template variable {name!r} is reserved; leave it out", param="messages")
        prepared = [self._prepare(message, index) for index, message in enumerate(messages)]
        return self._render(prepared, None if tools is None else list(tools), add_generation_prompt, kwargs)

    def _render(self, messages: list[Any], tools: list[Any] | None, add_prompt: bool, kwargs: Mapping[str, Any]) -> str:
        variables = {"tools": tools, "documents": None, **self._special_tokens, **kwargs}
        try:
            return self._template.render({**variables, "messages": messages, "add_generation_prompt": add_prompt})
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error.message or error}",
                param="messages",
                code="chat_template_error",
            ) from error
        # Whatever Python raises on a message that lacks a field or has one of the wrong type.
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"the model's chat template cannot handle these messages: {type(error).__name__}: {error}",
                param="messages",
                code="chat_template_error",
            ) from error

    def _prepare(self, message: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"messages[{index}]: expected an object with a role, got {message!r}"[:200], param="messages"
            )
        prepared = dict(message)
        content = prepared.get("content")
        if isinstance(content, list | tuple):
            parts = [_checked_part(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content)]
            prepared["content"] = parts if self.takes_parts else "\n".join(part["text"] for part in parts)
        if calls := prepared.get("tool_calls"):
            if not isinstance(calls, list | tuple):
                raise InvalidRequest(
                    f"messages[{index}].tool_calls must be a list, got {calls!r}"[:200], param="messages"
                )
            prepared["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        return prepared


def _checked_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return dict(part)
    found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidRequest(
        f"{where}: expected a part of type text with a text, got type {found!r}; this model takes text only",
        param="messages",
        code="unsupported_content",
    )


def _with_parsed_arguments(call: Any) -> Any:
    """Replace the JSON text of a call's arguments by the object, which is what templates print."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError as error:
        raise InvalidRequest(f"tool call arguments: expected JSON: {error}", param="messages") from error
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks the assistant's text for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, which could reach Python's internals."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model has not seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name the argument
    return datetime.now().strftime(format)
