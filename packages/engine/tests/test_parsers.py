"""Parsers of answers: what each family of models writes is found, however the text is cut into pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.events import CallArguments, CallBegin, Content, Event, Reasoning
from octavo_engine.text.parsers.formats import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    reasoning_format_of,
    tool_format_of,
)
from octavo_engine.text.parsers.harmony import HarmonyParser
from octavo_engine.text.parsers.parser import OutputParser

THINK = REASONING_FORMATS["think"]


class Case(NamedTuple):
    make: Callable[[], AnswerParser]
    text: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str = ""


def tools(name: str, **options: Any) -> Callable[[], AnswerParser]:
    return lambda: OutputParser(TOOL_FORMATS[name], names=("f", "get_weather"), **options)


def thinks(**options: Any) -> Callable[[], AnswerParser]:
    return lambda: OutputParser(None, THINK, **options)


DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"  # noqa: RUF001 - the model's own marks
DEEPSEEK_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"  # noqa: RUF001
DEEPSEEK_V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"  # noqa: RUF001
NESTED = '{"a": "x</tool_call>y", "b": [1, {"c": "\\""}], "d": "🎈"}'
ONE, TWO = ("f", '{"a": 1}'), ("get_weather", '{"city": "Paris"}')

CASES = {
    "hermes, two with text": Case(
        tools("hermes"),
        f'Let me see. \n<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call> done',
        content="Let me see. done",
        calls=(("f", NESTED), TWO),
    ),
    "hermes, several in one mark": Case(
        tools("hermes"),
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n'
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        calls=(ONE, TWO),
    ),
    "hermes, no arguments": Case(tools("hermes"), '<tool_call>{"name": "f"}</tool_call>', calls=(("f", "{}"),)),
    "hermes, null": Case(tools("hermes"), '<tool_call>{"name":"f","arguments":null}</tool_call>', calls=(("f", "{}"),)),
    "hermes, none": Case(tools("hermes"), "just <b>text</b>", content="just <b>text</b>"),
    "hermes, no call": Case(tools("hermes"), "<tool_call>what</tool_call>", content="<tool_call>what"),
    "hermes, no JSON": Case(tools("hermes"), '<tool_call>{"name" oops', content='<tool_call>{"name" oops'),
    "hermes, no name": Case(tools("hermes"), '<tool_call>{"a": {"b": 1}}', content='<tool_call>{"a": {"b": 1}}'),
    "hermes, cut off": Case(
        tools("hermes"), '<tool_call>{"name": "f", "arguments": {"a": [1, "b', calls=(("f", '{"a": [1, "b'),)
    ),
    "hermes, cut off in a mark": Case(
        tools("hermes"), '<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool', calls=(ONE,)
    ),
    "hermes, half a mark": Case(tools("hermes"), "if a <tool", content="if a <tool"),
    "hermes, one wanted": Case(
        tools("hermes", max_num_calls=1),
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "f"}</tool_call>',
        calls=(ONE,),
    ),
    "mistral, a list": Case(
        tools("mistral"),
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {"city": "Paris"}}]',
        calls=(ONE, TWO),
    ),
    "mistral, names before": Case(
        tools("mistral"),
        'Hi [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]x1[ARGS]{"city": "Paris"}',
        content="Hi",
        calls=(ONE, TWO),
    ),
    "deepseek, version 3": Case(
        tools("deepseek"),
        "ok " + DEEPSEEK.format(DEEPSEEK_V3.format(*ONE) + "\n" + DEEPSEEK_V3.format(*TWO)),
        content="ok",
        calls=(ONE, TWO),
    ),
    "deepseek, version 3.1": Case(
        tools("deepseek"),
        DEEPSEEK.format(DEEPSEEK_V31.format(*ONE) + DEEPSEEK_V31.format(*TWO)),
        calls=(ONE, TWO),
    ),
    "llama, bare": Case(
        tools("llama3_json"),
        '{"name": "f", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {"city": "Paris"}}',
        calls=(ONE, TWO),
    ),
    "llama, marked, in a string": Case(
        tools("llama3_json"),
        '<|python_tag|>{"type": "function", "name": "f", "parameters": "{\\"a\\": 1}"}',
        calls=(ONE,),
    ),
    "llama, an answer in JSON": Case(
        tools("llama3_json"), ' {"name": "Bob", "age": 3} is it', content=' {"name": "Bob", "age": 3} is it'
    ),
    "python, two": Case(
        tools("pythonic"),
        '[f(a=1, b="x)", c=[1, (2.5, None), {"k": True, "l": false}]), get_weather(city=\'Pa"ris\')]',
        calls=(
            ("f", '{"a": 1, "b": "x)", "c": [1, [2.5, null], {"k": true, "l": false}]}'),
            ("get_weather", '{"city": "Pa\\"ris"}'),
        ),
    ),
    "python, marked": Case(tools("pythonic"), "<|python_start|>[f(a=1)]<|python_end|>", calls=(ONE,)),
    "python, a link": Case(tools("pythonic"), "[f](https://x) too", content="[f](https://x) too"),
    "python, no literal": Case(tools("pythonic"), "[f(a=open('x'))]", content="[f(a=open('x'))]"),
    "python, unknown": Case(tools("pythonic"), "[g(a=1)]", content="[g(a=1)]"),
    "json, a list and text": Case(
        tools("json"), ' [{"name":"f","arguments":{"a": 1}}]  tail', content="tail", calls=(ONE,)
    ),
    "json, a call and a number": Case(
        tools("json"), '[{"name":"f","arguments":{"a": 1}}, 3]', content=" 3]", calls=(ONE,)
    ),
    "json, a list of numbers": Case(tools("json"), "[1, 2]", content="[1, 2]"),
    "thoughts": Case(thinks(), "<think>\nso 1 < 2\n</think>\n\nYes < no", content="Yes < no", reasoning="so 1 < 2"),
    "thoughts, begun by the prompt": Case(
        thinks(starts_in_reasoning=True), "so far</think>Yes", content="Yes", reasoning="so far"
    ),
    "thoughts, cut off": Case(thinks(), "<think>so far </thi", reasoning="so far </thi"),
    "thoughts, none": Case(thinks(), " no <think> here", content=" no <think> here"),
    "thoughts and a call": Case(
        tools("hermes", reasoning=THINK),
        '<think>a <tool_call> perhaps</think>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
        calls=(ONE,),
        reasoning="a <tool_call> perhaps",
    ),
    "gpt-oss, a call": Case(
        HarmonyParser,
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}<|call|>',
        calls=(ONE,),
        reasoning="Think.",
    ),
    "gpt-oss, two calls with a word before": Case(
        HarmonyParser,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json"
        '<|message|>{"a": 1}<|call|><|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>'
        '{"city": "Paris"}<|call|>',
        content="I look.",
        calls=(ONE, TWO),
    ),
    "gpt-oss, an answer": Case(
        HarmonyParser, "<|channel|>final<|message|>Hello  there.<|return|>", content="Hello  there."
    ),
    "gpt-oss, no channel": Case(HarmonyParser, "plain", content="plain"),
    "gpt-oss, cut off": Case(HarmonyParser, "<|channel|>analysis<|message|>cut o", reasoning="cut o"),
}


def parse(case: Case, cuts: list[int]) -> Case:
    """Parse the text of a case in pieces; return the case as it was found."""
    parser, events, start = case.make(), list[Event](), 0
    for end in [*cuts, len(case.text)]:
        events += parser.push(case.text[start:end])
        start = end
    events += parser.finish()
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[-1][1] += event.text
    return Case(
        case.make,
        case.text,
        content="".join(event.text for event in events if isinstance(event, Content)),
        calls=tuple((name, arguments) for name, arguments in calls),
        reasoning="".join(event.text for event in events if isinstance(event, Reasoning)),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_an_answer_holds_is_found(case: Case) -> None:
    assert parse(case, []) == case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cuts_change_nothing(case: Case) -> None:
    places = range(1, len(case.text))
    for cut in places:
        assert parse(case, [cut]) == case
    assert parse(case, list(places)) == case
    source = random.Random(len(case.text))
    for _ in range(20):
        assert parse(case, sorted(source.sample(places, min(5, len(places))))) == case


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "cut" not in name])
def test_arguments_are_json(name: str) -> None:
    for _, arguments in parse(CASES[name], []).calls:
        assert isinstance(json.loads(arguments), dict)


def test_arguments_come_while_they_are_written() -> None:
    parser = tools("hermes")()
    parser.push('<tool_call>{"name": "f", "arguments": {"text": "')
    assert parser.push("one ") == [CallArguments("one ")]
    assert parser.push("two") == [CallArguments("two")]


def test_an_answer_in_json_comes_while_it_is_written() -> None:
    assert tools("json")().push('{"answer": ') == [Content('{"answer": ')]


def test_text_is_held_back_no_longer_than_it_may_be_a_mark() -> None:
    parser = tools("hermes")()
    assert parser.push("a <") == [Content("a")]
    assert parser.push("tool_cal") == []
    assert parser.push("m down") == [Content(" <tool_calm down")]


def test_formats_are_known_by_the_chat_template() -> None:
    assert tool_format_of("... <tool_call> ...").name == "hermes"
    assert tool_format_of("[AVAILABLE_TOOLS] [TOOL_CALLS]").name == "mistral"
    assert tool_format_of("{{ messages }}").name == "json"
    assert reasoning_format_of("{{ '<think>' }}") == THINK
    assert reasoning_format_of("{{ messages }}") is None
