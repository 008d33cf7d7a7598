"""The routes of the prefix cache, on a fake engine with blocks of 16 tokens."""

import pytest

SYSTEM = [{"role": "system", "content": "You are a lighthouse keeper."}]
LONG = "x" * 40


def error_of(response):
    return response.json()["error"]


@pytest.mark.parametrize(
    ("prompt", "num_tokens"),
    [("x" * 40, [40]), (["a", "b" * 20], [1, 20]), ([1, 2, 3], [3]), ([[1], [2, 3]], [1, 2])],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_warmed_prompts_are_answered_in_order(client, engine, prompt, num_tokens):
    engine.num_cached_tokens = 1
    answer = client.post("/v1/cache/warm", json={"prompt": prompt, "cache_salt": "a"}).json()
    assert (answer["object"], answer["model"]) == ("list", "org/fake-model")
    assert answer["data"] == [
        {
            "object": "cache.warmed_prompt",
            "index": index,
            "prompt_tokens": count,
            "cached_tokens": 1,
            "warm_tokens": count // 16 * 16,
        }
        for index, count in enumerate(num_tokens)
    ]
    assert {(request.task, request.salt, request.pin) for request in engine.requests} == {("embed", b"a", False)}


def test_messages_are_warmed_as_a_chat_begins(client, engine):
    client.post("/v1/cache/warm", json={"messages": SYSTEM})
    assert bytes(engine.requests[0].prompt_token_ids) == b"<system>You are a lighthouse keeper.\n"


def test_a_pin_is_made_listed_and_dropped(client, engine):
    pin = client.post("/v1/cache/pins", json={"prompt": LONG}).json()
    assert pin["id"].startswith("pin-")
    assert pin == {"id": pin["id"], "object": "cache.pin", "pinned_tokens": 32, "blocks": 2}
    assert engine.requests[0].pin
    assert client.get("/v1/cache/pins").json() == {"object": "list", "data": [pin]}
    answer = client.delete(f"/v1/cache/pins/{pin['id']}")
    assert answer.json() == {"id": pin["id"], "object": "cache.pin.deleted", "deleted": True}
    assert client.get("/v1/cache/pins").json()["data"] == []
    assert client.delete(f"/v1/cache/pins/{pin['id']}").status_code == 404


def test_pins_of_another_salt_are_neither_listed_nor_found(client):
    pin = client.post("/v1/cache/pins", json={"messages": SYSTEM, "cache_salt": "a"}).json()
    for query in ("", "?cache_salt=b"):
        assert client.get(f"/v1/cache/pins{query}").json()["data"] == []
        response = client.delete(f"/v1/cache/pins/{pin['id']}{query}")
        assert (response.status_code, error_of(response)["code"]) == (404, "pin_not_found")
    assert client.get("/v1/cache/pins?cache_salt=a").json()["data"] == [pin]
    assert client.delete(f"/v1/cache/pins/{pin['id']}?cache_salt=a").status_code == 200


def test_pins_over_the_limit_are_400_with_the_numbers(client):
    response = client.post("/v1/cache/pins", json={"prompt": "x" * 150})
    assert response.status_code == 400
    assert error_of(response)["code"] == "pin_limit_reached"
    assert "takes 9 blocks, pins may hold 8" in error_of(response)["message"]


@pytest.mark.parametrize("route", ["warm", "pins"])
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, None),
        ({"prompt": "a", "messages": SYSTEM}, 400, None),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": [999]}, 400, "prompt"),
        ({"prompt": "x" * 300}, 400, "prompt"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages"),
        ({"prompt": LONG, "cache_salt": ""}, 400, "cache_salt"),
        ({"prompt": LONG, "model": "other"}, 404, "model"),
    ],
    ids=str,
)
def test_wrong_bodies_are_refused(client, engine, route, body, status, param):
    response = client.post(f"/v1/cache/{route}", json=body)
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert not engine.requests


def test_several_prompts_are_not_one_pin(client):
    response = client.post("/v1/cache/pins", json={"prompt": [LONG, LONG]})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


def test_embeddings_take_a_salt(client, engine):
    client.post("/v1/embeddings", json={"input": "a", "cache_salt": "team a"})
    assert engine.requests[0].salt == b"team a"
