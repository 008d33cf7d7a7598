"""StructuredOutputsParams: what the text of one request must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from octavo_engine.errors import InvalidRequest

MAX_NUM_BYTES = 1 << 20
"""The longest schema, regex, grammar or list of choices that is taken, in bytes of UTF-8."""

KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
"""The fields of which exactly one is given."""

_PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one kind of constraint on the text of a request; the names are vLLM's.

    Attributes:
        json: a JSON Schema, as a mapping, a bool or JSON text; kept as JSON text.
        json_object: any JSON object.
        regex: the whole text matches it; Rust's syntax, without look-around and back-references.
        choice: the text is one of these.
        grammar: a Lark grammar in llguidance's dialect, or GBNF.
        structural_tag: free text in which tags hold JSON: `{"structures": [{"begin", "schema", "end"}, ...],
            "triggers": [...]}`, as a mapping or JSON text; kept as JSON text.
        whitespace_pattern: a regex of what may stand between the parts of JSON; None allows nothing.

    Raises:
        InvalidRequest: if there is not exactly one kind, or a value has the wrong form.

    Example:
        >>> from octavo_engine import SamplingParams, StructuredOutputsParams
        >>> sampling = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    """

    json: str | bool | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False) or self._is_false_schema(kind)]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            _refuse(f"needs exactly one of {', '.join(KINDS)}; got {found}")
        if self.json is not None:
            object.__setattr__(self, "json", _json_text("json", self.json))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _json_text("structural_tag", self.structural_tag))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        if self.json_object not in (True, False):
            _refuse(f"json_object must be true or false, got {self.json_object!r}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        if self.whitespace_pattern is not None and self.json is None and not self.json_object:
            _refuse("whitespace_pattern goes with json or json_object alone; leave it out")

    def _is_false_schema(self, kind: str) -> bool:
        return kind == "json" and self.json is False


def _check_text(name: str, text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str) or not text:
        _refuse(f"{name} must be a non-empty string, got {text!r}"[:200])
    if "\0" in text:
        _refuse(f"{name} must not hold the character NUL")
    _check_size(name, text)


def _check_size(name: str, text: str) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{_PARAM}: {name} is no valid Unicode: {error.reason}", param=_PARAM) from error
    if num_bytes > MAX_NUM_BYTES:
        _refuse(f"{name} has {num_bytes} bytes, at most {MAX_NUM_BYTES} are taken; make it smaller")


def _choices(choice: Any) -> tuple[str, ...]:
    if isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
        _refuse(f"choice must be a list with at least one string, got {choice!r}"[:200])
    for text in choice:
        if not isinstance(text, str) or not text:
            _refuse(f"choice must hold non-empty strings, got {text!r}"[:200])
    _check_size("choice", "".join(choice))
    return tuple(choice)


def _json_text(name: str, value: Any) -> str:
    """Return a value, or the JSON text that it was given as, as JSON text; properties keep their order."""
    try:
        if isinstance(value, str):
            _check_size(name, value)
            value = json.loads(value)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{_PARAM}: {name} is no valid JSON: {error}", param=_PARAM) from error
    if not isinstance(value, Mapping | bool):
        _refuse(f"{name} must be a JSON object, got {text[:100]}")
    _check_size(name, text)
    return text


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest(f"{_PARAM}: {message}", param=_PARAM)
