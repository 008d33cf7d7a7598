"""GrammarCompiler: which texts a constraint accepts, what it refuses, its cache and its limits."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="structured output needs the extra octavo-engine[structured]")

from octavo_engine.errors import EngineBusy, InvalidRequest
from octavo_engine.structured import compiler as module
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import GGUFSource

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(demo_source: GGUFSource) -> Tokenizer:
    return demo_source.tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[EOS])


Accepts = Callable[..., bool]


@pytest.fixture(scope="module")
def accepts(tokenizer: Tokenizer, grammars: GrammarCompiler) -> Accepts:
    """Whether a constraint takes a text, spelled in bytes, as a whole: the end token may follow."""

    def accepts(text: str, **constraint: Any) -> bool:
        matcher = grammars.matcher(StructuredOutputsParams(**constraint))
        spelled = [tokenizer.encode(chr(byte), add_special_tokens=False)[0] for byte in text.encode() if byte < 128]
        assert len(spelled) == len(text.encode()), "texts of these tests are ASCII"
        taken = matcher.try_consume_tokens(spelled)
        ends = bool(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[EOS])
        return taken == len(spelled) and ends and not matcher.is_error()

    return accepts


@pytest.mark.parametrize("pattern", [r"[a-c]{2}", r"a|bc", r"^x+y?$", r"\d{1,3}\.", r"(?i)ab", r"a/b", r'"q"'])
def test_a_regex_takes_what_re_takes(accepts: Accepts, pattern: str) -> None:
    texts = ["", "a", "ab", "bc", "abc", "x", "xy", "xxyy", "12.", "1234.", "AB", "a/b", '"q"', "q", "bca", "yx"]
    assert [t for t in texts if accepts(t, regex=pattern)] == [t for t in texts if re.fullmatch(pattern, t)]


def test_choices_are_taken_as_they_are(accepts: Accepts) -> None:
    choice = ["yes", "y", 'say "no"', "a\\b", "line\nbreak", "tab\t", "a/b", "|", "<|im_end|>"]
    assert [text for text in [*choice, "ye", "no", ""] if accepts(text, choice=choice)] == choice


def test_json_is_compact_unless_asked_otherwise(accepts: Accepts) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert accepts('{"a":1}', json=schema)
    assert not accepts('{"a": 1}', json=schema)
    assert accepts('{"a": 1}', json=schema, whitespace_pattern=" ?")
    assert not accepts('{"a":  1}', json=schema, whitespace_pattern=" ?")


def test_a_schema_cannot_set_the_library_s_options(accepts: Accepts) -> None:
    assert not accepts("[ ]", json={"type": "array", "x-guidance": {"whitespace_flexible": True}})


@pytest.mark.parametrize("text", ['{"a":[1,null]}', "{}"])
def test_json_object_takes_objects_alone(accepts: Accepts, text: str) -> None:
    assert accepts(text, json_object=True)
    assert not accepts(f"[{text}]", json_object=True)


def test_grammars_are_lark_or_gbnf(accepts: Accepts) -> None:
    for grammar in ('start: "a" digits\ndigits: /[0-9]+/\n', 'root ::= "a" [0-9]+\n'):
        assert accepts("a12", grammar=grammar)
        assert not accepts("a", grammar=grammar)


TAG = {"begin": "<fn=add>", "schema": {"type": "array", "items": {"type": "integer"}}, "end": "</fn>"}


def test_structural_tags_hold_json_in_free_text(accepts: Accepts) -> None:
    tag = {"structures": [TAG], "triggers": ["<fn="]}
    for text in ("free text", "well: <fn=add>[1,2]</fn> and more"):
        assert accepts(text, structural_tag=tag)
    for text in ("<fn=sub>", "<fn=add>[1, 2]</fn>", "<fn=add>[1,2]"):
        assert not accepts(text, structural_tag=tag)


def test_a_special_token_may_be_the_trigger(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    tag = {"structures": [{**TAG, "begin": "<|im_start|>"}], "triggers": ["<|im_start|>"]}
    matcher = grammars.matcher(StructuredOutputsParams(structural_tag=tag))
    start = tokenizer.token_id("<|im_start|>")
    assert start is not None
    text = tokenizer.encode("[1]</fn>", add_special_tokens=False)
    assert matcher.try_consume_tokens([start, *text]) == 1 + len(text)


REFUSED = {
    "regex": ({"regex": "["}, "structured_outputs.regex: .*unclosed"),
    "look-around": ({"regex": "(?!a)b"}, "look-around"),
    "a regex of depth": ({"regex": "(" * 50_000}, "structured_outputs.regex"),
    "grammar": ({"grammar": "start: nothing"}, "unknown name"),
    "gbnf": ({"grammar": "root ::= ("}, "structured_outputs.grammar"),
    "a grammar of nothing": ({"grammar": "start: "}, "nothing but the empty text"),
    "pattern": (
        {"json": {"properties": {"a": {"type": "string", "pattern": "(("}}}},
        "at /properties/a/pattern: regex",
    ),
    "type": ({"json": {"items": {"type": "foo"}}}, "at /items/type: "),
    "format": ({"json": {"anyOf": [{}, {"type": "string", "format": "foo"}]}}, "at /anyOf/1/format: "),
    "bounds": ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "at /minimum: "),
    "enum": ({"json": {"$ref": "#/$defs/e", "$defs": {"e": {"enum": []}}}}, "at /\\$defs/e/enum: "),
    "false": ({"json": False}, "nothing fits"),
    "keyword": ({"json": {"not": {}}}, "at /not: "),
    "tags without one": ({"structural_tag": {"structures": [], "triggers": ["<"]}}, "at least one tag"),
    "a trigger that is none": ({"structural_tag": {"structures": [TAG], "triggers": ["["]}}, "none of the triggers"),
    "a tag's schema": (
        {"structural_tag": {"structures": [{**TAG, "schema": {"not": {}}}], "triggers": ["<fn="]}},
        "at /not: ",
    ),
}


@pytest.mark.parametrize(("constraint", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_had_is_refused(grammars: GrammarCompiler, constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s){message}") as caught:
        grammars.check(StructuredOutputsParams(**constraint))
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"},
        {"regex": "(.{1,1000}x){1,1000}"},
        {"regex": "(?:(?:a+)+)+b"},
        {"json": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}},
        {"json": {"type": "array", "maxItems": 10**9}},
        {"json": {"enum": [f"x{i}" for i in range(20_000)]}},
    ],
    ids=["powers", "long lines", "nested stars", "powers in a string", "a billion items", "many values"],
)
def test_what_might_explode_takes_its_time_or_is_refused(grammars: GrammarCompiler, constraint: dict[str, Any]) -> None:
    started = time.monotonic()
    with contextlib.suppress(InvalidRequest):
        grammars.check(StructuredOutputsParams(**constraint))
    assert time.monotonic() - started < module.TIME_BUDGET + 1


def test_a_constraint_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    compiled = []
    real = module.grammar_of
    monkeypatch.setattr(module, "grammar_of", lambda params, own: compiled.append(params) or real(params, own))
    grammars = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[EOS], num_cached=2)
    a, b, c = (StructuredOutputsParams(regex=text) for text in "abc")
    for params in (a, a, b, a, c, a, b):  # c drops b, which was used least recently
        grammars.check(params)
    assert compiled == [a, b, c, b]


def test_matchers_do_not_share_their_state(grammars: GrammarCompiler, tokenizer: Tokenizer) -> None:
    params = StructuredOutputsParams(regex="ab")
    one, other = grammars.matcher(params), grammars.matcher(params)
    assert one.consume_token(tokenizer.encode("a", add_special_tokens=False)[0])
    assert one.compute_bitmask() != other.compute_bitmask()


def test_the_time_budget_is_kept(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    real = module.grammar_of

    def slow(params: StructuredOutputsParams, own: Tokenizer) -> str:
        time.sleep(0.5)
        return real(params, own)

    monkeypatch.setattr(module, "grammar_of", slow)
    grammars = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[EOS], time_budget=0.05)
    with pytest.raises(InvalidRequest, match="s to compile") as caught:
        grammars.check(StructuredOutputsParams(regex="a"))
    assert caught.value.code == "grammar_too_complex"


def test_those_that_take_too_long_hold_up_no_other(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    real, goes_on = module.grammar_of, threading.Event()

    def stuck(params: StructuredOutputsParams, own: Tokenizer) -> str:
        if params.regex == "stuck":
            goes_on.wait(20)
        return real(params, own)

    monkeypatch.setattr(module, "grammar_of", stuck)
    grammars = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[EOS], time_budget=0.2)
    grammars.check(StructuredOutputsParams(regex="a"))
    for _ in range(module._MAX_NUM_COMPILING - 1):
        with pytest.raises(InvalidRequest, match="s to compile"):
            grammars.check(StructuredOutputsParams(regex="stuck"))
    grammars.check(StructuredOutputsParams(regex="b"))
    with pytest.raises(InvalidRequest, match="s to compile"):
        grammars.check(StructuredOutputsParams(regex="stuck"))
    with pytest.raises(EngineBusy, match="try again later"):
        grammars.check(StructuredOutputsParams(regex="c"))
    grammars.check(StructuredOutputsParams(regex="b"))  # is compiled already
    goes_on.set()
    grammars.check(StructuredOutputsParams(regex="c"))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    grammars = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[EOS])
    with pytest.raises(InvalidRequest, match=r"pip install 'octavo-engine\[structured\]'"):
        grammars.check(StructuredOutputsParams(regex="a"))


def test_a_model_without_an_end_token_is_refused(tokenizer: Tokenizer) -> None:
    grammars = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[])
    with pytest.raises(InvalidRequest, match="a token that ends a text"):
        grammars.check(StructuredOutputsParams(regex="a"))


def test_ids_beyond_the_tokenizer_are_never_allowed(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size + 40
    grammars = GrammarCompiler(tokenizer, vocab_size=size, eos_token_ids=[EOS])
    mask = grammars.matcher(StructuredOutputsParams(regex="(?s:.)*")).compute_bitmask()
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
    assert len(mask) == -(-size // 32) * 4
    assert allowed.max() < tokenizer.vocab_size
    assert set(allowed) & tokenizer.special_token_ids == {EOS}


def test_tokens_of_sentencepiece_follow_texts_as_its_own_encoder_writes_them(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(sentencepiece_folder)
    assert tokenizer.strip_leading_space
    eos = tokenizer.eos_token_ids
    grammars = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=eos)
    for text in ("hello world", " the fox", "caf\u00e9\n", "x</s>", "<unk>"):
        matcher = grammars.matcher(StructuredOutputsParams(choice=[text]))
        forced: list[int] = []
        while token_ids := matcher.compute_ff_tokens():
            assert matcher.consume_tokens(token_ids)
            forced += token_ids
        allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if not np.unpackbits(allowed, bitorder="little")[eos[0]]:  # the last tokens may be left to the draw
            rest = np.flatnonzero(np.unpackbits(allowed, bitorder="little"))
            forced.append(int(rest[0]))
        spelled = b"".join(map(tokenizer.token_bytes, forced))
        assert spelled
        assert text.encode().startswith(spelled)
        assert tokenizer.special_token_ids.isdisjoint(forced)
