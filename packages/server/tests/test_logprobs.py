import json
import math

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def text_logprobs(client, **body):
    response = client.post(TEXT, json={"prompt": "abc", **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chat_content(client, **body):
    response = client.post(CHAT, json={"messages": [USER], "logprobs": True, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_text_logprobs_are_null_unless_asked_for(client):
    assert text_logprobs(client)["logprobs"] is None
    assert text_logprobs(client, logprobs=None)["logprobs"] is None


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_text_logprobs_have_equal_lists_with_the_sampled_token_always_there(client, num_top):
    choice = text_logprobs(client, logprobs=num_top)
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert logprobs["tokens"] == list(" Paris.")
    assert logprobs["text_offset"] == list(range(7))
    assert logprobs["token_logprobs"] == [-0.5] * 7
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert len(top) == max(num_top, 1)
        assert top[token] == max(top.values())


def test_minus_infinity_is_minus_9999(client):
    response = client.post(TEXT, json={"prompt": "abc", "logprobs": 5, "max_tokens": 1})
    assert sorted(response.json()["choices"][0]["logprobs"]["top_logprobs"][0].values())[0] == -9999.0
    json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} in the answer"))


def test_chat_logprobs_are_null_unless_asked_for(client):
    for fields in ({}, {"logprobs": False}, {"logprobs": None}, {"top_logprobs": None}):
        answer = client.post(CHAT, json={"messages": [USER], **fields}).json()
        assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(("fields", "num_top"), [({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 3}, 3)])
def test_chat_logprobs_have_exactly_the_alternatives_asked_for(client, fields, num_top):
    logprobs = chat_content(client, **fields)["logprobs"]
    assert set(logprobs) == {"content", "refusal"}
    assert logprobs["refusal"] is None
    assert "".join(entry["token"] for entry in logprobs["content"]) == " Paris."
    for entry in logprobs["content"]:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == num_top
        assert all(set(top) == {"token", "logprob", "bytes"} for top in entry["top_logprobs"])


def test_a_character_over_several_tokens_has_its_text_at_the_last_one_and_all_bytes(client, engine):
    engine.replies = ["a 😀世"]
    content = chat_content(client)["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", " ", "", "", "", "😀", "", "", "世"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "a 😀世"


def test_bytes_that_are_no_text_are_labelled_as_bytes(client, engine):
    engine.replies = ["é"]
    top = chat_content(client, top_logprobs=2)["logprobs"]["content"][0]["top_logprobs"]
    assert [entry["token"] for entry in top] == ["bytes:\\xc3", "bytes:\\xc4"]
    assert [entry["bytes"] for entry in top] == [[0xC3], [0xC4]]


def test_a_broken_tail_counts_once(client, engine):
    engine.replies = ["a😀"]
    choice = chat_content(client, max_tokens=3)
    assert choice["message"]["content"] == "a\ufffd"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "", "\ufffd"]


@pytest.mark.parametrize("stop", ["ris", "s", " "], ids=["middle", "late", "at once"])
def test_tokens_behind_a_stop_string_have_no_entry(client, stop):
    choice = chat_content(client, stop=stop)
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]


def test_special_tokens_have_entries_only_if_the_text_has_them(client):
    assert chat_content(client)["logprobs"]["content"][-1]["token"] == "."
    choice = chat_content(client, skip_special_tokens=False)
    assert choice["message"]["content"] == " Paris.<eos>"
    assert choice["logprobs"]["content"][-1]["token"] == "<eos>"


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize("reply", [" Paris.", "a 😀世", "ab ris"])
def test_each_chunk_has_the_logprobs_of_its_own_text(engine, stream, step, reply):
    engine.step = step
    engine.replies = [reply]
    for event in stream(CHAT, messages=[USER], logprobs=True, stop="risk")[:-1]:
        choice = event["choices"][0]
        text = choice["delta"].get("content") or ""
        tokens = "".join(entry["token"] for entry in (choice["logprobs"] or {"content": []})["content"])
        assert tokens == text


def test_text_offsets_go_on_through_the_chunks(engine, stream):
    engine.step = 2
    events = stream(TEXT, prompt="x", logprobs=0)[:-1]
    offsets = [o for event in events for o in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == list(range(7))


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (TEXT, {"prompt": "a", "logprobs": -1}, "logprobs"),
        (TEXT, {"prompt": "a", "logprobs": True}, "logprobs"),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": [USER], "top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        (CHAT, {"messages": [USER], "logprobs": 3}, "logprobs"),
    ],
)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_limits_are_refused_and_the_next_request_works(client, path, fields, param, streams):
    response = client.post(path, json={**fields, "stream": streams})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert math.isclose(text_logprobs(client, logprobs=0)["logprobs"]["token_logprobs"][0], -0.5)
