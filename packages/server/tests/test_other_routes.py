import base64
import struct
from importlib.metadata import version

import pytest

USER = {"role": "user", "content": "hi"}


def test_models_are_listed_in_openai_shape(client):
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    (card,) = answer["data"]
    assert card["id"] == "org/fake-model"
    assert card["object"] == "model"
    assert isinstance(card["created"], int)
    assert card["owned_by"] == "octavo"
    assert card["max_model_len"] == 200


def test_a_model_is_found_by_a_name_with_a_slash(client):
    assert client.get("/v1/models/org/fake-model").json() == client.get("/v1/models").json()["data"][0]


def test_an_unknown_model_is_404(client):
    response = client.get("/v1/models/org/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_served_names_replace_the_engines_own(make_client, engine):
    client = make_client(engine, served_model_names=("a", "b"))
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "b"]
    for name, expected in (("b", "b"), ("a", "a"), (None, "a")):
        assert client.post("/v1/completions", json={"prompt": "x", "model": name}).json()["model"] == expected
    assert client.post("/v1/completions", json={"prompt": "x", "model": "org/fake-model"}).status_code == 404


def test_health_and_readiness(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready", "models": ["org/fake-model"]}


def test_version_names_the_packages(client):
    answer = client.get("/version").json()
    assert answer["version"] == version("octavo-server")
    assert answer["packages"]["octavo-engine"] == version("octavo-engine")


@pytest.mark.parametrize(
    ("given", "num_tokens"), [("ab", [2]), (["a", "bcd"], [1, 3]), ([1, 2], [2]), ([[1], [2, 3]], [1, 2])], ids=str
)
def test_embeddings_come_in_order(client, given, num_tokens):
    answer = client.post("/v1/embeddings", json={"input": given, "model": "org/fake-model"}).json()
    assert answer["object"] == "list"
    assert answer["model"] == "org/fake-model"
    assert answer["data"] == [
        {"object": "embedding", "index": i, "embedding": [0.6, -0.8]} for i in range(len(num_tokens))
    ]
    assert answer["usage"] == {"prompt_tokens": sum(num_tokens), "total_tokens": sum(num_tokens)}


def test_embeddings_in_base64_are_little_endian_floats(client):
    answer = client.post("/v1/embeddings", json={"input": "a", "encoding_format": "base64"}).json()
    assert struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"])) == pytest.approx((0.6, -0.8))


@pytest.mark.parametrize(("fields", "pooling"), [({}, "last"), ({"pooling": "mean"}, "mean")])
def test_pooling_reaches_the_engine(client, engine, fields, pooling):
    client.post("/v1/embeddings", json={"input": "a", **fields})
    assert (engine.requests[0].task, engine.requests[0].pooling) == ("embed", pooling)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [999]}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
    ],
    ids=str,
)
def test_a_wrong_embeddings_request_is_400(client, body, param):
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_tokenize_a_prompt(client):
    assert client.post("/tokenize", json={"prompt": "aé", "unknown": 1}).json() == {
        "count": 3,
        "max_model_len": 200,
        "tokens": [97, 0xC3, 0xA9],
    }


def test_tokenize_gives_token_texts_if_asked_for(client):
    answer = client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, "<user>hi\n<assistant>"), ({"add_generation_prompt": False}, "<user>hi\n")],
    ids=["with generation prompt", "without"],
)
def test_tokenize_messages(client, fields, expected):
    tokens = client.post("/tokenize", json={"messages": [USER], **fields}).json()["tokens"]
    assert bytes(tokens).decode() == expected


def test_an_empty_prompt_has_no_tokens(client):
    assert client.post("/tokenize", json={"prompt": ""}).json()["count"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": [USER]},
        {"prompt": 5},
        {"messages": []},
        {"messages": [USER], "add_special_tokens": True},
        {"prompt": "a", "add_generation_prompt": True},
    ],
    ids=str,
)
def test_a_wrong_tokenize_request_is_400(client, body):
    assert client.post("/tokenize", json=body).status_code == 400


def test_detokenize_gives_the_text_with_special_tokens(client):
    assert client.post("/detokenize", json={"tokens": [97, 256]}).json() == {"prompt": "a<eos>"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_detokenize_refuses_an_id_out_of_the_vocabulary(client):
    response = client.post("/detokenize", json={"tokens": [1, 258]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens[1]"


def test_a_chat_is_tokenised_as_it_would_be_answered(client):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    answer = client.post("/tokenize", json=body).json()
    assert bytes(answer["tokens"]).decode() == "<user>a\n<assistant>b"
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    told = client.post("/tokenize", json={"messages": messages[:1], "tools": [tool]}).json()
    assert b"look_up" in bytes(told["tokens"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "tools": [{}]}, None),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools[0]"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ x }}"}, "chat_template"),
    ],
    ids=["tools of a prompt", "no function", "a template of its own"],
)
def test_what_cannot_be_tokenised_is_refused(client, body, param):
    response = client.post("/tokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
