"""Beam search over HTTP: the fields, what contradicts them, and answers of the real scheduler on a fake model."""

import json

import pytest
from starlette.testclient import TestClient

from octavo_engine.async_engine import AsyncEngine
from octavo_engine.beam_search import BeamSearch
from octavo_engine.engine import Engine
from octavo_engine.executor.fake import FakeExecutor, hashed_candidates, hashed_next_token
from octavo_engine.scheduler import Scheduler
from octavo_kvcache import CacheManager
from octavo_server import create_app

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LETTERS = 120  # token ids below it: one byte each
CANDIDATES = hashed_candidates(LETTERS)


@pytest.fixture
def executor():
    return FakeExecutor(16, hashed_next_token(LETTERS), candidates=CANDIDATES)


@pytest.fixture
def real(engine, executor):
    """An app on a real engine whose model is fake."""
    scheduler = Scheduler(CacheManager(100, 16), max_num_seqs=8, max_num_batched_tokens=64, max_model_len=200)
    running = AsyncEngine(Engine(scheduler, executor), engine.text, engine.info)
    with TestClient(create_app(running)) as client:
        yield client
    running.close()


def alone(prompt: list[int], width: int, num_tokens: int) -> list[str]:
    search, beams = BeamSearch(width, max_num_tokens=num_tokens), [prompt]
    while not search.finished:
        places = search.advance([CANDIDATES(beam, width) for beam in beams])
        beams = [[*beams[place.source], place.token_id] for place in places if place is not None]
    return [bytes(h.token_ids).decode("latin-1") for h in search.hypotheses]


def test_n_of_best_of_beams_are_returned_best_first(real):
    body = {"prompt": "abc", "use_beam_search": True, "best_of": 4, "n": 2, "max_tokens": 6, "temperature": 0}
    answer = real.post(TEXT, json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == alone([97, 98, 99], 4, 6)[:2]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 12


def test_without_best_of_n_is_the_width_and_a_stream_brings_the_same(real):
    body = {"prompt": ["abc", "x"], "use_beam_search": True, "n": 3, "max_tokens": 5, "logprobs": 2}
    answer = real.post(TEXT, json=body).json()
    assert [c["text"] for c in answer["choices"]] == alone([97, 98, 99], 3, 5) + alone([120], 3, 5)
    assert all(len(choice["logprobs"]["tokens"]) == 5 for choice in answer["choices"])
    lines = real.post(TEXT, json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in lines) == 6


def test_chat_searches_too(real):
    body = {"messages": [{"role": "user", "content": "hi"}], "use_beam_search": True, "n": 2, "max_tokens": 4}
    answer = real.post(CHAT, json=body).json()
    assert len({choice["message"]["content"] for choice in answer["choices"]}) == 2


def test_a_stop_string_ends_hypotheses_and_is_cut_from_their_texts(real):
    body = {"prompt": "abc", "use_beam_search": True, "n": 4, "max_tokens": 30, "length_penalty": 0}
    free = real.post(TEXT, json=body).json()["choices"]
    stop = free[0]["text"][1:3]
    choices = real.post(TEXT, json=body | {"stop": stop}).json()["choices"]
    kept = real.post(TEXT, json=body | {"stop": stop, "include_stop_str_in_output": True}).json()["choices"]
    stopped = [choice["finish_reason"] == "stop" for choice in choices]
    assert any(stopped)
    assert [len(choice["text"]) < 30 for choice in choices] == stopped
    assert [c["text"] + stop * s for c, s in zip(choices, stopped, strict=True)] == [c["text"] for c in kept]
    assert not any(stop in choice["text"] for choice in choices)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_fewer_texts_than_are_asked_for_are_answered(real, executor, path):
    executor.candidates = hashed_candidates(2)
    prompts = {"prompt": ["abc", "x"]} if path == TEXT else {"messages": [{"role": "user", "content": "hi"}]}
    body = {**prompts, "use_beam_search": True, "n": 3, "max_tokens": 1}
    answer = real.post(path, json=body).json()
    indices = [0, 1, 3, 4] if path == TEXT else [0, 1]  # those of the second prompt begin at 3 all the same
    assert [choice["index"] for choice in answer["choices"]] == indices
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * len(indices)
    assert answer["usage"]["completion_tokens"] == len(indices)
    *events, done = real.post(path, json={**body, "stream": True, "echo": False}).text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert sorted({chunk["index"] for chunk in chunks}) == indices
    assert sorted(chunk["index"] for chunk in chunks if chunk["finish_reason"] == "length") == indices


def test_the_fields_reach_the_engine(client, engine):
    engine.replies = ["a", "b"]
    body = {
        "prompt": "abc",
        "use_beam_search": True,
        "best_of": 5,
        "n": 2,
        "length_penalty": 0.5,
        "early_stopping": "never",
        "stop_token_ids": [7],
        "ignore_eos": True,
    }
    assert client.post(TEXT, json=body).status_code == 200
    beams = engine.requests[0].beams
    assert (beams.beam_width, beams.num_return_sequences, beams.length_penalty) == (5, 2, 0.5)
    assert (beams.early_stopping, beams.stop_token_ids, beams.ignore_eos) == ("never", (7,), True)
    assert engine.requests[0].sampling.n == 2


def test_rules_reach_the_engine_and_the_models_own_penalty_holds(client, engine):
    engine.text.default_sampling = {"repetition_penalty": 1.5, "temperature": 0.3}
    rules = {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "dry_multiplier": 0.8,
        "allowed_token_ids": [1, 2],
        "min_tokens": 3,
        "truncate_prompt_tokens": 2,
        "skip_special_tokens": False,
    }
    body = {
        "prompt": "abc",
        "use_beam_search": True,
        "logit_bias": {"5": 2},
        "bad_words": ["x"],
        "stop": "END",
        **rules,
    }
    assert client.post(TEXT, json=body).status_code == 200
    assert client.post(TEXT, json=body | {"repetition_penalty": 1.1}).status_code == 200
    sampling, beams = engine.requests[0].sampling, engine.requests[0].beams
    own = {name: getattr(beams, name) for name in rules}
    assert own == rules
    assert (sampling.logit_bias, sampling.bad_words_ids, sampling.stop_strings) == (
        {5: 2},
        ((120,), (32, 120)),
        ("END",),
    )
    assert [request.sampling.repetition_penalty for request in engine.requests] == [1.5, 1.1]
    assert engine.requests[0].prompt_token_ids == [98, 99]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"mirostat_mode": 2}, "mirostat_mode"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stop": ["x" * 300]}, "stop"),
        ({"min_tokens": 30}, "min_tokens"),
        ({"repetition_penalty": 0}, None),
        ({"best_of": 2, "n": 3}, "n"),
        ({"best_of": 9}, "best_of"),
        ({"n": 129}, None),
        ({"length_penalty": 11.0}, "length_penalty"),
        ({"early_stopping": "sometimes"}, None),
    ],
    ids=str,
)
def test_what_does_not_go_with_beams_is_400(client, fields, param):
    response = client.post(TEXT, json={"prompt": "a", "use_beam_search": True, **fields})
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("field", ["length_penalty", "early_stopping"])
def test_a_searchs_fields_without_a_search_are_400(client, field):
    response = client.post(TEXT, json={"prompt": "a", field: 1.0 if field == "length_penalty" else True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
