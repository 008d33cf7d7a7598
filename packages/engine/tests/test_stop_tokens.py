"""Stop strings by token ids, against a search of the text that the tokens make."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.stop_automaton import StopAutomaton
from octavo_engine.text.output import TextStream
from octavo_engine.text.stop_tokens import StopTokens
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import GGUFSource

LETTERS = "aabé"  # é is two bytes, which tokens may hold one by one


@pytest.fixture(scope="module")
def tokenizer(demo_source: GGUFSource) -> Tokenizer:
    return demo_source.tokenizer()


def vocabulary(tokens: Sequence[bytes], special: Sequence[int] = ()) -> Any:
    return SimpleNamespace(
        special_token_ids=frozenset(special),
        token_bytes=lambda token_id: tokens[token_id] if token_id < len(tokens) else b"",
        strip_leading_space=False,
    )


def num_tokens_to_stop(automaton: StopAutomaton, token_ids: Sequence[int]) -> int | None:
    state = 0
    for count, token_id in enumerate(token_ids, start=1):
        after = automaton.after(state, token_id)
        if after is None:
            return count
        state = after
    return None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_sequence_ends_with_the_token_that_completes_a_stop_string(data: st.DataObject) -> None:
    raw = st.binary(min_size=0, max_size=2) | st.text(LETTERS, max_size=4).map(str.encode)
    tokens = [b"a", b"b", "é".encode()[:1], "é".encode()[1:], b"", *data.draw(st.lists(raw, max_size=12))]
    stops = data.draw(st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=4))
    special = data.draw(st.lists(st.integers(0, len(tokens)), max_size=2))
    skips = data.draw(st.booleans())
    # One id beyond the vocabulary, as a padded model has it: it adds no text.
    token_ids = data.draw(st.lists(st.integers(0, len(tokens)), max_size=30))
    tokenizer = vocabulary(tokens, special)
    automaton = StopTokens(tokenizer, len(tokens) + 1).automaton(stops, skip_special_tokens=skips)

    def text_of(count: int) -> bytes:
        shown = [i for i in token_ids[:count] if not (skips and i in special)]
        return b"".join(map(tokenizer.token_bytes, shown))

    complete = [count for count in range(len(token_ids) + 1) if any(stop.encode() in text_of(count) for stop in stops)]
    assert num_tokens_to_stop(automaton, token_ids) == min(complete, default=None)


def test_it_ends_where_the_front_end_cuts_the_text(tokenizer: Tokenizer) -> None:
    text = (
        "The capital of France is Paris. It is a large city, and has been so for long.\n\nGermany's is Berlin 😀 too."
    )
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    made = StopTokens(tokenizer, tokenizer.vocab_size + 10)
    for stop in (".", "\n", "\n\nG", " city, and", "s a la", "😀", "Berlin 😀 t", "x", "is Paris. It", "e"):
        stream = TextStream(tokenizer, stop=[stop])
        used = stream.push(token_ids, finished=True)
        found = num_tokens_to_stop(made.automaton([stop], skip_special_tokens=True), token_ids)
        assert found == (used.num_tokens_used if used.stop_reason else None), stop


def test_an_automaton_is_made_once(tokenizer: Tokenizer) -> None:
    made = StopTokens(tokenizer, tokenizer.vocab_size)
    first = made.automaton(["###", "."], skip_special_tokens=True)
    assert made.automaton([".", "###", "."], skip_special_tokens=True) is first
    assert made.automaton([".", "###"], skip_special_tokens=False) is not first


def test_a_stop_string_that_is_no_unicode_never_comes(tokenizer: Tokenizer) -> None:
    automaton = StopTokens(tokenizer, tokenizer.vocab_size).automaton(["\ud83d"], skip_special_tokens=True)
    assert num_tokens_to_stop(automaton, tokenizer.encode("a 😀 and more")) is None
