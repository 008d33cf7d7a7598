from typing import Any

import pytest

from octavo_engine.text.infill import InfillTokens


def complete(client: Any, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"prompt": "abc", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_completion_has_openai_shape(client, engine):
    answer = complete(client)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "org/fake-model"
    assert isinstance(answer["created"], int)
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_max_tokens_defaults_to_16_and_ends_with_length(client, engine):
    engine.replies = ["x" * 50]
    answer = complete(client)
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


def test_max_tokens_null_is_the_default(client, engine):
    complete(client, max_tokens=None)
    assert engine.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", [[104, 105]]), (["a", "b"], [[97], [98]]), ([104, 105], [[104, 105]]), ([[1, 2], [3]], [[1, 2], [3]])],
    ids=["string", "strings", "ids", "lists of ids"],
)
def test_prompt_takes_four_forms(client, engine, prompt, expected):
    complete(client, prompt=prompt)
    assert [request.prompt_token_ids for request in engine.requests] == expected


def test_choices_are_numbered_prompt_by_prompt(client, engine):
    engine.replies = ["first", "second"]
    answer = complete(client, prompt=["a", "b", "c"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in answer["choices"]] == ["first", "second"] * 3


def test_usage_counts_a_prompt_once_and_sums_choices(client, engine):
    engine.replies = ["ab", "c"]
    engine.num_cached_tokens = 2
    usage = complete(client, prompt=["xyz", "xyz"], n=2)["usage"]
    assert usage["prompt_tokens"] == 6
    assert usage["completion_tokens"] == 2 * (3 + 2)  # the end tokens count
    assert usage["total_tokens"] == 16
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize(
    ("prompt", "echo"), [("abc", "abc"), ([97, 98], "ab"), ([97, 256, 98], "ab")], ids=["text", "ids", "special id"]
)
def test_echo_puts_the_prompt_before_the_text(client, prompt, echo):
    assert complete(client, prompt=prompt, echo=True)["choices"][0]["text"] == f"{echo} Paris."


def test_echo_without_tokens_returns_the_prompt_alone(client, engine):
    answer = complete(client, prompt="abc", echo=True, max_tokens=0)
    assert answer["choices"][0] == {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.requests == []


def test_echo_without_tokens_has_n_choices_per_prompt(client):
    answer = complete(client, prompt=["a", "b"], n=2, echo=True, max_tokens=0)
    assert [choice["text"] for choice in answer["choices"]] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("stop", ["ri", ["x", "ri"], ["is", "ri"]], ids=["string", "second of two", "earliest wins"])
def test_stop_string_is_cut_from_the_text(client, stop):
    choice = complete(client, stop=stop)["choices"][0]
    assert choice["text"] == " Pa"
    assert choice["finish_reason"] == "stop"


def test_stop_string_stays_if_asked_for(client):
    assert complete(client, stop="ri", include_stop_str_in_output=True)["choices"][0]["text"] == " Pari"


@pytest.mark.parametrize("stop", [None, []], ids=["null", "empty list"])
def test_no_stop_is_taken(client, stop):
    assert complete(client, stop=stop)["choices"][0]["text"] == " Paris."


def test_every_sampling_field_reaches_the_engine(client, engine):
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "seed": -5,
        "max_tokens": 20,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 2,
    }
    complete(client, stop=["END"], priority=3, cache_salt="tenant", **fields)
    request = engine.requests[0]
    got = {name: getattr(request.sampling, name) for name in fields}
    assert got == fields | {"stop_token_ids": (7,)}
    assert request.sampling.stop_strings == ("END",)
    assert request.priority == 3
    assert request.salt == b"tenant"


def test_the_models_own_defaults_apply_where_nothing_is_set(client, engine):
    engine.text.default_sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    complete(client, top_p=0.5)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 20)


def test_two_choices_at_temperature_0_are_served(client):
    assert len(complete(client, n=2, temperature=0)["choices"]) == 2


def test_a_null_byte_in_the_prompt_is_text(client, engine):
    complete(client, prompt="a\0b")
    assert engine.requests[0].prompt_token_ids == [97, 0, 98]


@pytest.mark.parametrize(
    "neutral",
    [
        {"suffix": None},
        {"suffix": ""},
        {"logit_bias": {}},
        {"best_of": 1},
        {"response_format": {"type": "text"}},
        {"user": "me"},
        {"unheard_of": [1]},
        {"stream_options": None},
        {"stream": False},
    ],
    ids=lambda fields: next(iter(fields)) + "=" + str(next(iter(fields.values()))),
)
def test_fields_that_change_nothing_and_unknown_fields_are_taken(client, neutral):
    assert complete(client, **neutral)["choices"][0]["text"] == " Paris."


def test_a_character_over_several_tokens_comes_whole(client, engine):
    engine.replies = ["a 😀世"]
    assert complete(client)["choices"][0]["text"] == "a 😀世"


def test_a_broken_tail_becomes_one_replacement_character(client, engine):
    engine.replies = ["a😀"]
    assert complete(client, max_tokens=3)["choices"][0]["text"] == "a\ufffd"


@pytest.mark.parametrize(
    "body", [{"chat_template_kwargs": {"a": 1}}, {"add_generation_prompt": True}, {"continue_final_message": True}]
)
def test_fields_of_chats_are_refused(client, body):
    response = client.post("/v1/completions", json={"prompt": "a", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(body))


def test_a_suffix_makes_the_prompt_for_what_stands_before_it(client, engine, monkeypatch):
    monkeypatch.setattr(engine.text, "_infill", InfillTokens(1, 2, 3))
    for prompt in ("ab", [97, 98], ["ab"], [[97, 98]]):
        assert client.post("/v1/completions", json={"prompt": prompt, "suffix": "yz"}).status_code == 200
        assert engine.requests[-1].prompt_token_ids == [1, *b"ab", 2, *b"yz", 3]
    answer = client.post("/v1/completions", json={"prompt": "", "suffix": "yz"}).json()
    assert engine.requests[-1].prompt_token_ids == [1, 2, *b"yz", 3]
    assert (answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]) == (" Paris.", 5)


@pytest.mark.parametrize("field", [{"echo": True}, {"parent_id": "cmpl-1"}], ids=str)
def test_what_does_not_go_with_a_suffix_is_refused(client, field):
    response = client.post("/v1/completions", json={"prompt": "a", "suffix": "z"} | field)
    assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(field)))
