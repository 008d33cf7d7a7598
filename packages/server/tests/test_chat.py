from typing import Any

import pytest

USER = {"role": "user", "content": "hi"}


def chat(client: Any, messages: Any = (USER,), **body: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": list(messages), **body})
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(engine: Any) -> str:
    return bytes(engine.requests[-1].prompt_token_ids).decode()


def test_chat_completion_has_openai_shape(client):
    answer = chat(client)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "org/fake-model"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len("<user>hi\n<assistant>")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8


def test_messages_go_through_the_template(client, engine):
    chat(client, [{"role": "system", "content": "be brief"}, USER])
    assert prompt_of(engine) == "<system>be brief\n<user>hi\n<assistant>"


def test_content_parts_are_joined_by_line_breaks(client, engine):
    chat(client, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    assert prompt_of(engine) == "<user>a\nb\n<assistant>"


def test_developer_is_system(client, engine):
    chat(client, [{"role": "developer", "content": "x"}, USER])
    assert prompt_of(engine) == "<system>x\n<user>hi\n<assistant>"


def test_tool_results_and_assistant_messages_without_content_are_taken(client, engine):
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat(
        client,
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ],
    )
    assert prompt_of(engine) == '<user>hi\n<assistant>[{"name": "f", "arguments": {}}]\n<tool>42\n<assistant>'


def test_a_conversation_goes_on_from_its_last_message(client, engine):
    chat(client, [USER, {"role": "assistant", "content": "Well,"}], continue_final_message=True)
    assert prompt_of(engine) == "<user>hi\n<assistant>Well,"
    chat(client, [USER], add_generation_prompt=False)
    assert prompt_of(engine) == "<user>hi\n"


def test_unknown_fields_in_messages_are_ignored(client, engine):
    chat(client, [USER | {"mood": "good"}])
    assert prompt_of(engine) == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 200 - len("<user>hi\n<assistant>")),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": None}, 180),
    ],
    ids=["neither: room left", "max_tokens", "max_completion_tokens", "the newer wins", "null"],
)
def test_token_limits(client, engine, fields, expected):
    chat(client, **fields)
    assert engine.requests[0].sampling.max_tokens == expected


def test_n_choices_come_in_index_order(client, engine):
    engine.replies = ["one", "two", "three"]
    choices = chat(client, n=3)["choices"]
    assert [(c["index"], c["message"]["content"]) for c in choices] == [(0, "one"), (1, "two"), (2, "three")]


def test_an_empty_answer_is_an_empty_string(client, engine):
    engine.replies = [""]
    answer = chat(client)
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "usr", "content": "x"}, "messages[1].role"),
        ({"role": "usr", "content": [{"type": "text", "text": "x"}]}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": ["user"], "content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ("hi", "messages[1]"),
    ],
    ids=["role", "role with parts", "no role", "role is a list", "no content", "content is a number", "no object"],
)
def test_a_wrong_message_is_named(client, message, param):
    response = client.post("/v1/chat/completions", json={"messages": [USER, message]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_an_image_is_refused(client):
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    assert "image_url" in response.json()["error"]["message"]


def test_a_model_without_a_template_says_so(client, engine):
    engine.text._chat_template = None
    response = client.post("/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"
