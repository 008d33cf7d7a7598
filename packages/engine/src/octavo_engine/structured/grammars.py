"""From StructuredOutputsParams to the grammar that llguidance reads; its JSON Schemas are checked before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.json_schema import SchemaTree, simplified
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_STRINGS = "begin", "end"


def grammar_of(params: StructuredOutputsParams, tokenizer: Tokenizer) -> str:
    """Return the grammar of a constraint, in llguidance's own form.

    Raises:
        InvalidRequest: if a schema cannot be supported or a grammar cannot be read; names what and where.
    """
    from llguidance import LLMatcher

    if params.json is not None:
        assert isinstance(params.json, str)
        schema = json.loads(params.json)
        SchemaTree(schema)
        return json_grammar(schema, params.whitespace_pattern)
    if params.json_object:
        return json_grammar({"type": "object"}, params.whitespace_pattern)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(_literal(text) for text in params.choice)}")
    if params.grammar is not None:
        return _written_grammar(params.grammar)
    assert isinstance(params.structural_tag, str)
    return _tags_grammar(json.loads(params.structural_tag), tokenizer)


def json_grammar(schema: Any, whitespace_pattern: str | None) -> str:
    """Return the grammar of a JSON Schema that has passed `SchemaTree`; compact unless a pattern of space is given."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(_plain(schema), None, _options(whitespace_pattern))


def _options(whitespace_pattern: str | None) -> JsonCompileOptions:
    return {"whitespace_flexible": False, "whitespace_pattern": whitespace_pattern}


def _plain(schema: Any) -> dict[str, Any]:
    """Return a schema as an object without what would restrict nothing or is llguidance's own."""
    as_object = schema if isinstance(schema, Mapping) else _of_boolean(schema)
    return {key: value for key, value in simplified(as_object).items() if key != "x-guidance"}


def _of_boolean(schema: bool) -> dict[str, Any]:
    if not schema:
        raise InvalidRequest("JSON Schema at /: nothing fits the schema false", param="structured_outputs")
    return {}


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _written_grammar(text: str) -> str:
    from llguidance import grammar_from

    try:
        return grammar_from("grammar" if "::=" in text else "lark", text)
    except ValueError as error:
        raise InvalidRequest(f"structured_outputs.grammar: {error}", param="structured_outputs") from error


def _tags_grammar(spec: Any, tokenizer: Tokenizer) -> str:
    """Return the grammar of structural tags: free text up to a trigger, then one of the tags that begin with it."""
    from llguidance import StructTag

    structures, triggers = _tag_lists(spec)
    tags = []
    for index, structure in enumerate(structures):
        begin, end = (structure[name] for name in _STRINGS)
        trigger = next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            _refuse_tag(f"structures[{index}].begin {begin!r} starts with none of the triggers {list(triggers)}")
        schema = structure.get("schema", {})
        SchemaTree(schema)
        grammar = {**_plain(schema), "x-guidance": _options(None)}
        tags.append(StructTag(trigger=trigger, begin=begin, grammar=grammar, end=end))
    special = [text for text in triggers if tokenizer.token_id(text) in tokenizer.special_token_ids]
    if special and special != triggers:
        _refuse_tag("triggers must be all special tokens of the model, or none of them")
    return StructTag.to_grammar(tags, assume_special=bool(special))


def _tag_lists(spec: Any) -> tuple[Sequence[Mapping[str, Any]], Sequence[str]]:
    structures, triggers = spec.get("structures"), spec.get("triggers")
    if not isinstance(structures, list) or not structures:
        _refuse_tag("structures must be a list with at least one tag")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        _refuse_tag("triggers must be a list of non-empty strings")
    for index, structure in enumerate(structures):
        if not isinstance(structure, dict) or not all(isinstance(structure.get(name), str) for name in _STRINGS):
            _refuse_tag(f"structures[{index}] must be an object with the strings begin and end")
    return structures, triggers


def _refuse_tag(message: str) -> NoReturn:
    raise InvalidRequest(f"structured_outputs.structural_tag: {message}", param="structured_outputs")
