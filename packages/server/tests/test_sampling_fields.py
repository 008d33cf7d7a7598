"""Sampling fields of vLLM and OpenAI over HTTP: what reaches the engine, what is refused, and what comes back."""

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
FIELDS = {
    "typical_p": 0.5,
    "xtc_probability": 0.25,
    "xtc_threshold": 0.2,
    "mirostat_tau": 3.0,
    "mirostat_eta": 0.2,
    "dry_multiplier": 0.8,
    "dry_base": 2.0,
    "dry_allowed_length": 3,
    "dry_sequence_breakers": ["a"],
    "allowed_token_ids": [5, 97],
    "bad_words": ["b"],
    "prompt_logprobs": 2,
    "truncate_prompt_tokens": 7,
    "min_p": 0.25,
    "top_k": 3,
}


def post(client, path, **fields):
    body = {"prompt": "abc"} if path == TEXT else {"messages": [USER]}
    response = client.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client, path, **fields):
    body = {"prompt": "abc"} if path == TEXT else {"messages": [USER]}
    response = client.post(path, json=body | fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"]


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_every_field_reaches_the_engine(client, engine, path):
    post(client, path, **FIELDS, logit_bias={"97": 3, "98": -1.5})
    sampling = engine.requests[0].sampling
    got = {name: getattr(sampling, name) for name in FIELDS}
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in got.items()} == FIELDS
    assert sampling.logit_bias == {97: 3, 98: -1.5}
    assert (97,) not in sampling.bad_words_ids
    assert (98,) in sampling.bad_words_ids


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1.5": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"258": 1}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [258]),
        ("bad_words", [""]),
        ("typical_p", 0),
        ("prompt_logprobs", 21),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", 201),
        ("mirostat_mode", 3),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_refused_by_name(client, engine, path, field, value):
    assert refused(client, path, **{field: value}).split(".")[0].split("[")[0] == field
    assert engine.requests == []


def test_contradictions_are_refused_by_name(client):
    assert refused(client, TEXT, mirostat_mode=2, top_p=0.5) == "mirostat_mode"
    assert refused(client, TEXT, n=3, best_of=2) == "best_of"
    assert refused(client, TEXT, best_of=2, temperature=0) == "best_of"
    assert refused(client, TEXT, best_of=2, stream=True) == "best_of"
    assert refused(client, TEXT, best_of=9) == "best_of"
    assert refused(client, TEXT, prompt_logprobs=1, stream=True) == "prompt_logprobs"
    assert refused(client, CHAT, prompt_logprobs=1, stream=True) == "prompt_logprobs"


def test_the_models_own_defaults_hold_where_nothing_is_given(client, engine):
    engine.text.default_sampling = {"typical_p": 0.75, "temperature": 0.5}
    post(client, TEXT)
    post(client, TEXT, typical_p=0.9)
    assert [r.sampling.typical_p for r in engine.requests] == [0.75, 0.9]
    assert [r.sampling.temperature for r in engine.requests] == [0.5, 0.5]


# -- best_of -----------------------------------------------------------------------------------------------------


def test_the_best_of_several_samples_come_back(client, engine):
    engine.replies = ["worst", "good!", "best!"]
    answer = post(client, TEXT, n=2, best_of=3, prompt="ab")
    assert [(c["index"], c["text"], c["logprobs"]) for c in answer["choices"]] == [
        (0, "best!", None),
        (1, "good!", None),
    ]
    assert engine.requests[0].sampling.num_sequences == 3
    assert answer["usage"]["completion_tokens"] == 12


def test_the_best_of_each_prompt_come_back(client, engine):
    engine.replies = ["no", "ok"]
    answer = post(client, TEXT, best_of=2, prompt=["ab", "cd"], logprobs=0)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "ok"), (1, "ok")]
    assert answer["choices"][0]["logprobs"]["tokens"] == ["o", "k"]


# -- echo with log-probabilities ---------------------------------------------------------------------------------


def echoed(client, prompt, **fields):
    (choice,) = post(client, TEXT, prompt=prompt, echo=True, **fields)["choices"]
    logprobs = choice["logprobs"]
    assert len({len(values) for values in logprobs.values()}) == 1
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    return choice


def test_echo_with_logprobs_covers_prompt_and_text(client):
    choice = echoed(client, "abc", logprobs=1)
    logprobs = choice["logprobs"]
    assert choice["text"] == "abc Paris."
    assert logprobs["tokens"] == list("abc Paris.")
    assert logprobs["token_logprobs"] == [None] + [-0.5] * 9
    assert logprobs["top_logprobs"][:3] == [None, {"b": -0.5}, {"c": -0.5}]
    assert logprobs["text_offset"] == list(range(10))


def test_echo_alone_with_logprobs_counts_no_token(client, engine):
    answer = post(client, TEXT, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_echoed_characters_stand_with_their_last_token_and_special_tokens_have_no_text(client):
    assert echoed(client, "a 😀世", logprobs=0)["logprobs"]["tokens"][:9] == ["a", " ", "", "", "", "😀", "", "", "世"]
    tokens = echoed(client, [97, 256, 98], logprobs=0)["logprobs"]["tokens"]
    assert tokens[:3] == ["a", "", "b"]
    shown = echoed(client, [97, 256, 98], logprobs=0, skip_special_tokens=False)
    assert shown["logprobs"]["tokens"][:3] == ["a", "<eos>", "b"]


def test_each_choice_of_each_prompt_has_its_prompts_logprobs(client):
    answer = post(client, TEXT, prompt=["ab", "cde"], n=2, echo=True, logprobs=0)
    firsts = [choice["logprobs"]["tokens"][:2] for choice in answer["choices"]]
    assert firsts == [["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]]


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stream_brings_an_echos_logprobs_before_the_text(client, engine, stream, step):
    engine.step = step
    engine.replies = ["first", "second"]
    fields = {"prompt": ["ab", "cde"], "n": 2, "echo": True, "logprobs": 1}
    chunks = [event["choices"][0] for event in stream(TEXT, **fields)[:-1]]
    for whole in post(client, TEXT, **fields)["choices"]:
        own = [chunk for chunk in chunks if chunk["index"] == whole["index"]]
        assert own[0]["text"] == ("cde" if whole["index"] > 1 else "ab")
        assert own[0]["logprobs"]["tokens"] == list(own[0]["text"])
        assert "".join(chunk["text"] for chunk in own) == whole["text"]
        for name, values in whole["logprobs"].items():
            assert [value for chunk in own for value in chunk["logprobs"][name]] == values


def test_an_echo_alone_is_streamed_with_its_logprobs(stream):
    first, last, _ = stream(TEXT, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    assert first["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "length")


# -- prompt_logprobs, token ids, truncation ----------------------------------------------------------------------


def test_prompt_logprobs_have_vllms_form(client):
    (choice,) = post(client, TEXT, prompt="ab", prompt_logprobs=2)["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "99": {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
        },
    ]
    answer = post(client, CHAT, prompt_logprobs=0)
    assert answer["prompt_logprobs"][0] is None
    assert all(len(entry) == 1 for entry in answer["prompt_logprobs"][1:])
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_token_ids_come_back_when_they_are_wanted(client):
    (choice,) = post(client, TEXT, return_token_ids=True)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98, 99], [*b" Paris.", 256])
    answer = post(client, CHAT, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [*b" Paris.", 256]
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert "token_ids" not in post(client, TEXT)["choices"][0]
    assert "prompt_token_ids" not in post(client, CHAT)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_streamed_token_ids_join_to_the_whole(stream, path):
    fields = {"prompt": "abc"} if path == TEXT else {"messages": [USER]}
    *events, _ = stream(path, **fields, return_token_ids=True)
    token_ids = [i for event in events for i in event["choices"][0].get("token_ids", ())]
    assert token_ids == [*b" Paris.", 256]
    first = events[0]["choices"][0] if path == TEXT else events[0]
    assert first["prompt_token_ids"][-1:] == ([99] if path == TEXT else [ord(">")])


def test_a_truncated_prompt_is_echoed_as_it_was_read(client, engine):
    (choice,) = post(client, TEXT, prompt="abcdef", truncate_prompt_tokens=2, echo=True)["choices"]
    assert choice["text"] == "ef Paris."
    assert engine.requests[0].prompt_token_ids == [101, 102]
    assert post(client, TEXT, prompt="x" * 500, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 184


def test_tokens_can_be_named_by_their_ids(client):
    (choice,) = post(client, TEXT, prompt="ab", echo=True, logprobs=1, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"][:3] == ["token_id:97", "token_id:98", "token_id:32"]
    assert choice["logprobs"]["top_logprobs"][1:3] == [{"token_id:98": -0.5}, {"token_id:32": -0.5}]
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    answer = post(client, CHAT, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"]) == ("token_id:32", [32])
    assert [entry["token"] for entry in first["top_logprobs"]] == ["token_id:32", "token_id:33"]
