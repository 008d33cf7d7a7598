"""TextStream: tokens in, text out, cut at stop strings."""

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo_engine.text.output import TextDelta, TextStream
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import GGUFSource


@pytest.fixture
def tokenizer(make_gguf: Callable[..., Path]) -> Tokenizer:
    return GGUFSource(make_gguf()).tokenizer()


def ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """Return one id per text: each must be a token."""
    found = [tokenizer.encode(text) for text in texts]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


def test_text_comes_as_the_tokens_do(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(ids(tokenizer, "hello", " wor"), finished=False) == TextDelta("hello wor", 2, None)
    assert stream.push(ids(tokenizer, "l", "d"), finished=True) == TextDelta("ld", 2, None)


def test_stop_string_across_tokens_ends_the_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["o w"])
    assert stream.push(ids(tokenizer, "hello"), finished=False) == TextDelta("hell", 1, None)
    assert stream.push(ids(tokenizer, " wor", "l", "d"), finished=False) == TextDelta("", 1, "o w")


def test_stop_string_is_kept_on_request(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["o w"], include_stop_str_in_output=True)
    assert stream.push(ids(tokenizer, "hello", " wor"), finished=True) == TextDelta("hello w", 2, "o w")


def test_beginning_of_a_stop_that_never_came_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["other"])
    assert stream.push(ids(tokenizer, "hello"), finished=False) == TextDelta("hell", 1, None)
    assert stream.push([], finished=True) == TextDelta("o", 0, None)


def test_broken_character_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    first, _ = tokenizer.encode("é")
    assert stream.push([first], finished=False) == TextDelta("", 1, None)
    assert stream.push([], finished=True) == TextDelta("\ufffd", 0, None)


def test_replacement_at_the_end_can_complete_a_stop(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["\ufffd"])
    assert stream.push([tokenizer.encode("é")[0]], finished=True) == TextDelta("", 1, "\ufffd")


@pytest.mark.parametrize(("skip", "text"), [(True, "hello"), (False, "hello<|im_end|>")])
def test_special_tokens_are_text_only_on_request(tokenizer: Tokenizer, skip: bool, text: str) -> None:
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    assert stream.push(ids(tokenizer, "hello", "<|im_end|>"), finished=True) == TextDelta(text, 2, None)


def test_push_after_the_end_is_our_own_mistake(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    stream.push([], finished=True)
    with pytest.raises(AssertionError, match="push after the end"):
        stream.push([], finished=False)


def test_no_stop_string_is_looked_for_before_min_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, stop=["o w", "r"], min_tokens=2)
    assert stream.push(ids(tokenizer, "hello"), finished=False) == TextDelta("hello", 1, None)
    assert stream.push(ids(tokenizer, " wor", "l", "d"), finished=False) == TextDelta(" world", 3, None)
    assert stream.push(ids(tokenizer, " wor"), finished=False) == TextDelta(" wo", 1, "r")
