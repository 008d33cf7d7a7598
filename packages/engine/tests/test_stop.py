"""StopMatcher: the same cut for every way to split a text, and nothing of a stop string shown too early."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo_engine.text.stop import StopMatcher, StopResult


def run(stops: list[str], pieces: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops, include_stop), ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        if stopped is not None:
            return shown, stopped
    return shown + matcher.flush(), None


def expected(stops: list[str], text: str, include_stop: bool = False) -> tuple[str, str | None]:
    """Try every end position in order: the definition, spelled out."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["STOP"], "go STOP here", ("go ", "STOP")),
        (["STOP"], "go STO", ("go STO", None)),
        (["b", "ab"], "xab", ("x", "ab")),
        (["abcd", "bc"], "abcd", ("a", "bc")),
        (["aab"], "aaab", ("a", "aab")),
        (["\n\n"], "a\nb\n\nc", ("a\nb", "\n\n")),
        (["日本"], "これは日本", ("これは", "日本")),
        ([], "anything", ("anything", None)),
    ],
)
def test_text_is_cut_before_the_first_complete_stop(stops: list[str], text: str, shown: tuple[str, str | None]) -> None:
    assert run(stops, [text]) == shown


def test_stop_string_is_shown_on_request() -> None:
    assert run(["STOP"], ["go ST", "OP on"], include_stop=True) == ("go STOP", "STOP")


def test_only_what_could_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("a <") == StopResult("a ", None)
    assert matcher.feed("en") == StopResult("", None)
    assert matcher.feed("x") == StopResult("<enx", None)
    assert matcher.feed("<<e") == StopResult("<", None)
    assert matcher.flush() == "<e"


def _splits(text: str) -> list[list[str]]:
    """Return every way to cut a text into pieces."""
    cuts = itertools.product((False, True), repeat=max(len(text) - 1, 0))
    found = []
    for cut in cuts:
        pieces = [text[:1]]
        for char, new in zip(text[1:], cut, strict=True):
            if new:
                pieces.append(char)
            else:
                pieces[-1] += char
        found.append(pieces)
    return found


@given(
    text=st.text(alphabet="ab", max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    include_stop=st.booleans(),
)
@example(text="aabaab", stops=["aabaa", "ba"], include_stop=False)
@settings(max_examples=150, deadline=None)
def test_every_split_gives_the_same_text(text: str, stops: list[str], include_stop: bool) -> None:
    for pieces in _splits(text):
        assert run(stops, pieces, include_stop) == expected(stops, text, include_stop), pieces


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_nothing_shown_is_ever_part_of_the_stop(text: str, stops: list[str]) -> None:
    matcher, shown, final = StopMatcher(stops), "", expected(stops, text)[0]
    for char in text:
        piece, stopped = matcher.feed(char)
        shown += piece
        assert final.startswith(shown)
        if stopped is not None:
            break


def test_long_stop_strings_cost_no_more_per_character() -> None:
    stops = ["a" * 20_000 + "b"] * 4
    assert run(stops, ["a" * 50] * 600) == ("a" * 30_000, None)
