"""The choice among beams, against a plain statement of its rules and against all sequences there are."""

import itertools
import math
import random
from dataclasses import fields
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.beam_search import BeamSearch, Place
from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.text.stop_tokens import StopTokens

EARLY = st.sampled_from([True, False, "never"])
PENALTIES = st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0])


def model(vocab_size: int, seed: int):
    """A distribution over the next token for every sequence of tokens."""

    def logprobs(token_ids: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{seed} {token_ids}")
        weights = [rng.random() ** 3 + 1e-3 for _ in range(vocab_size)]
        return [math.log(weight / sum(weights)) for weight in weights]

    return logprobs


def candidates_of(logprobs, token_ids: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
    own = logprobs(token_ids)
    best = sorted(range(len(own)), key=lambda token_id: -own[token_id])[:count]
    return best, [own[token_id] for token_id in best]


def run(search: BeamSearch, logprobs) -> list[tuple[tuple[int, ...], float]]:
    """Play the scheduler: keep the beams' tokens by what the search says, until it ends."""
    beams: list[tuple[int, ...]] = [()]
    while not search.finished:
        places = search.advance([candidates_of(logprobs, beam, search.num_candidates) for beam in beams])
        if search.finished:
            break
        for index, place in enumerate(places):  # whoever is continued keeps its place for the best continuation
            if place is not None and index < len(beams) and place.source != index:
                assert all(p is None or p.source != index for p in places)
        beams = [(*beams[place.source], place.token_id) for place in places if place is not None]
    return [(hypothesis.token_ids, hypothesis.score) for hypothesis in search.hypotheses]


def stated(logprobs, vocab_size, width, max_num_tokens, length_penalty, early_stopping, num_stop_ids, ends):
    """Beam search in as few words as possible; `ends` tells of some tokens whether the last one ends them."""
    running, ended, length = [((), 0.0)], [], 0
    while True:
        length += 1
        extended = [
            ((*tokens, token_id), score + logprob)
            for tokens, score in running
            for token_id, logprob in zip(range(vocab_size), logprobs(tokens), strict=True)
        ]
        extended.sort(key=lambda beam: -beam[1])
        del extended[max(2, 1 + num_stop_ids) * width :]
        over = [length == max_num_tokens or ends(tokens) for tokens, _ in extended]
        for (tokens, score), is_over in list(zip(extended, over, strict=True))[:width]:
            if is_over:
                ended.append((tokens, score / length**length_penalty))
        ended = sorted(ended, key=lambda hypothesis: -hypothesis[1])[:width]
        running = [beam for beam, is_over in zip(extended, over, strict=True) if not is_over][:width]
        if length == max_num_tokens or not running:
            return ended
        if len(ended) == width:
            if early_stopping is True:
                return ended
            hopeful = max_num_tokens if early_stopping == "never" and length_penalty > 0 else length
            if running[0][1] / hopeful**length_penalty <= ended[-1][1]:
                return ended


@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 6), st.integers(1, 7), PENALTIES, EARLY, st.integers(0, 3), st.integers(0, 999)
)
def test_a_search_does_what_the_rules_say(vocab_size, width, max_num_tokens, penalty, early, num_stops, seed):
    stop_ids = range(min(num_stops, vocab_size - 1))
    logprobs = model(vocab_size, seed)
    search = BeamSearch(
        width, max_num_tokens=max_num_tokens, length_penalty=penalty, early_stopping=early, stop_token_ids=stop_ids
    )
    expected = stated(
        logprobs,
        vocab_size,
        width,
        max_num_tokens,
        penalty,
        early,
        len(stop_ids),
        lambda tokens: tokens[-1] in stop_ids,
    )
    found = run(search, logprobs)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-9)
    assert [h.stopped for h in search.hypotheses] == [tokens[-1] in stop_ids for tokens, _ in expected]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 3), st.integers(1, 4),
    st.integers(1, 8), PENALTIES, EARLY, st.integers(0, 999),
)  # fmt: skip
def test_stop_strings_end_hypotheses_as_stop_tokens_do(stops, min_tokens, width, max_num_tokens, penalty, early, seed):
    words = ["a", "b", "ab", "ba", "c", ""]
    tokenizer = SimpleNamespace(special_token_ids=frozenset(), token_bytes=lambda i: words[i].encode())
    search = BeamSearch(
        width,
        max_num_tokens=max_num_tokens,
        length_penalty=penalty,
        early_stopping=early,
        stops=StopTokens(tokenizer, len(words)).automaton(stops, skip_special_tokens=True),
        min_tokens=min_tokens,
    )

    def ends(tokens: tuple[int, ...]) -> bool:
        return any(stop in "".join(words[i] for i in tokens[min_tokens:]) for stop in stops)

    logprobs = model(len(words), seed)
    expected = stated(logprobs, len(words), width, max_num_tokens, penalty, early, 0, ends)
    found = run(search, logprobs)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-9)
    assert [h.stopped for h in search.hypotheses] == [ends(tokens) for tokens, _ in expected]
    assert all(h.stop_token_id is None for h in search.hypotheses)


def test_a_width_that_covers_everything_finds_the_best_of_all_sequences():
    logprobs, length = model(3, 5), 4
    search = BeamSearch(3**length, max_num_tokens=length, length_penalty=0.0)
    every = {
        tokens: sum(logprobs(tokens[:i])[token_id] for i, token_id in enumerate(tokens))
        for tokens in itertools.product(range(3), repeat=length)
    }
    found = run(search, logprobs)
    assert [tokens for tokens, _ in found] == sorted(every, key=lambda tokens: -every[tokens])
    assert found[0][1] == pytest.approx(max(every.values()))


def test_the_best_continuation_stays_and_others_take_the_places_that_are_free():
    search = BeamSearch(3, max_num_tokens=9)
    assert search.advance([([5, 6, 7], [-1.0, -2.0, -3.0])]) == [Place(0, 5), Place(0, 6), Place(0, 7)]
    moves = search.advance([([1, 2, 3], [-9.0] * 3), ([1, 2, 3], [-0.1, -0.2, -0.3]), ([4, 5, 6], [-0.1, -5.0, -6.0])])
    assert moves == [Place(1, 2), Place(1, 1), Place(1, 3)]  # beams 0 and 2 end; the best of beam 1 stays


def test_logprobs_follow_a_hypothesis_through_its_beams():
    logprobs = model(6, 3)
    search = BeamSearch(3, max_num_tokens=5, num_top_logprobs=2)
    run(search, logprobs)
    for hypothesis in search.hypotheses:
        assert hypothesis.logprobs is not None
        for position, entry in enumerate(hypothesis.logprobs):
            own = logprobs(hypothesis.token_ids[:position])
            order = sorted(range(6), key=lambda token_id, own=own: -own[token_id])
            assert entry.token_id == hypothesis.token_ids[position]
            assert entry.logprob == own[entry.token_id]
            assert entry.rank == order.index(entry.token_id) + 1
            assert entry.top == tuple((token_id, own[token_id]) for token_id in order[:2])
        assert hypothesis.score == pytest.approx(sum(e.logprob for e in hypothesis.logprobs) / 5)


def test_what_only_shapes_a_random_draw_is_no_parameter_of_a_search():
    shared = {field.name for field in fields(BeamSearchParams)} & {field.name for field in fields(SamplingParams)}
    assert {field.name for field in fields(SamplingParams)} - shared == {
        "n", "best_of", "temperature", "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "xtc_threshold",
        "mirostat_mode", "mirostat_tau", "mirostat_eta", "seed", "logprobs_mode", "logprob_token_ids",
        "prompt_logprobs", "output_kind",
    }  # fmt: skip
    defaults = {f.name: getattr(BeamSearchParams(beam_width=1), f.name) for f in fields(BeamSearchParams)}
    assert {name: defaults[name] for name in shared} == {name: getattr(SamplingParams(), name) for name in shared}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": True}, "beam_width"),
        ({"beam_width": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"beam_width": 2, "early_stopping": "always"}, "early_stopping"),
        ({"beam_width": 2, "early_stopping": 1}, "early_stopping"),
        ({"beam_width": 2, "length_penalty": math.nan}, "length_penalty"),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens"),
        ({"beam_width": 2, "logprobs": -1}, "logprobs"),
        ({"beam_width": 2, "stop_token_ids": list(range(17))}, "stop_token_ids"),
        ({"beam_width": 2, "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"beam_width": 2, "stop_token_ids": 5}, "stop_token_ids"),
        ({"beam_width": 2, "stop": ["é" * 129]}, "stop"),
        ({"beam_width": 2, "stop": [""]}, "stop"),
        ({"beam_width": 2, "repetition_penalty": 0.0}, "repetition_penalty"),
        ({"beam_width": 2, "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"beam_width": 2, "bad_words_ids": [[]]}, "bad_words_ids"),
        ({"beam_width": 2, "logit_bias": {3: 1000}}, "logit_bias"),
        ({"beam_width": 2, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
    ids=str,
)
def test_params_that_cannot_be_are_refused(wrong, param):
    with pytest.raises(InvalidRequest) as caught:
        BeamSearchParams(**wrong)
    assert caught.value.param == param
