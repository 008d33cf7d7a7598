"""The routes of administrators: sleep, wake up, other weights, an empty prefix cache."""

import pytest

from octavo_engine.errors import (
    CorruptModelFile,
    EngineDead,
    IncompatibleWeights,
    ModelNotFound,
    UnsupportedModel,
)

ROUTES = ["POST /sleep", "POST /wake_up", "GET /is_sleeping", "POST /update_weights_from_disk",
          "POST /reset_prefix_cache"]  # fmt: skip


@pytest.fixture
def admin(make_client, engine):
    client = make_client(engine, admin_api_key="root")
    client.headers["authorization"] = "Bearer root"
    return client


def error_of(response):
    return response.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
def test_they_are_for_administrators(make_client, engine, route):
    method, path = route.split()
    client = make_client(engine, admin_api_key="root", api_keys=("user",))
    for key, status in (("user", 403), ("nobody", 401)):
        response = client.request(method, path, headers={"authorization": f"Bearer {key}"})
        assert (response.status_code, engine.asked) == (status, [])


def test_sleeping_and_waking_report_the_memory(admin, engine):
    assert admin.get("/is_sleeping").json() == {"is_sleeping": False, "level": 0}
    assert admin.post("/sleep?level=2&mode=wait").json() == {
        "object": "engine.memory",
        "sleep_level": 2,
        "weights_digest": "",
        "bytes_before": 1000,
        "bytes_after": 400,
        "freed_bytes": 600,
        "seconds": 0.5,
    }
    assert admin.get("/is_sleeping").json() == {"is_sleeping": True, "level": 2}
    assert admin.post("/wake_up?tags=weights&tags=kv_cache").json()["freed_bytes"] == -600
    admin.post("/sleep")
    admin.post("/wake_up")
    admin.post("/wake_up?tags=weights,kv_cache")
    assert engine.asked == [
        ("sleep", 2, "wait"),
        ("wake_up", ["weights", "kv_cache"]),
        ("sleep", 1, None),
        ("wake_up", None),
        ("wake_up", ["weights", "kv_cache"]),
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/cache/warm", {"prompt": "a"}),
    ],
    ids=["completion", "stream", "chat stream", "embedding", "warming"],
)
def test_requests_are_told_that_the_engine_sleeps(admin, path, body):
    admin.post("/sleep")
    response = admin.post(path, json=body)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_asleep")
    assert "POST /wake_up" in error_of(response)["message"]
    assert int(response.headers["retry-after"]) > 0
    admin.post("/wake_up")
    assert admin.post(path, json=body).status_code == 200


def test_anthropics_clients_are_told_in_their_shape(admin):
    admin.post("/sleep")
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    response = admin.post("/v1/messages", json=body)
    assert (response.status_code, error_of(response)["type"]) == (503, "overloaded_error")


def test_a_sleeping_server_lives_is_not_ready_and_still_tokenises(admin):
    admin.post("/sleep?level=2")
    assert admin.get("/health").status_code == 200
    assert (admin.get("/ready").status_code, admin.get("/v1/models").status_code) == (503, 200)
    assert admin.post("/tokenize", json={"prompt": "abc"}).json()["count"] == 3
    states = [line for line in admin.get("/metrics").text.splitlines() if line.startswith("octavo_engine_sleep_state")]
    assert [line.split("=")[1] for line in states] == ['"awake"} 0.0', '"weights_offloaded"} 0.0', '"discard_all"} 1.0']


def test_requests_that_run_are_409_and_the_sdk_need_not_try_again(admin, engine):
    engine.num_running = 3
    response = admin.post("/sleep")
    assert (response.status_code, error_of(response)["code"]) == (409, "engine_in_use")
    assert response.headers["x-should-retry"] == "false"
    assert admin.post("/sleep?mode=abort").status_code == 200


@pytest.mark.parametrize(
    ("path", "param"),
    [("/sleep?level=0", "level"), ("/sleep?level=deep", "level"), ("/sleep?mode=keep", "mode"),
     ("/wake_up?tags=everything", "tags")],
)  # fmt: skip
def test_wrong_queries_are_refused(admin, engine, path, param):
    response = admin.post(path)
    assert (response.status_code, error_of(response)["param"], engine.asked) == (400, param, [])


def test_other_weights_change_the_fingerprint(admin, engine):
    def fingerprint():
        return admin.post("/v1/completions", json={"prompt": "a"}).json()["system_fingerprint"]

    before = fingerprint()
    answer = admin.post("/update_weights_from_disk", json={"model_path": "/new", "mode": "wait", "load_format": "auto"})
    assert (answer.status_code, answer.json()["weights_digest"]) == (200, "/new")
    assert engine.asked == [("update", "/new", "wait")]
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ModelNotFound("/x: no such file"), 400, "model_not_found"),
        (CorruptModelFile("/x: cut short"), 400, "corrupt_model_file"),
        (UnsupportedModel("/x: unknown"), 400, "unsupported_model"),
        (IncompatibleWeights("/x: num_layers"), 400, "incompatible_weights"),
        (EngineDead("closed"), 503, "engine_dead"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_weights_that_cannot_be_served_say_why(admin, engine, error, status, code):
    engine.unreadable["/x"] = error
    response = admin.post("/update_weights_from_disk", json={"model_path": "/x"})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    if status == 400:
        assert "/x" in error_of(response)["message"]


@pytest.mark.parametrize("body", [{}, {"model_path": ""}, {"model_path": 5}, {"model_path": "a", "mode": "keep"}])
def test_wrong_bodies_of_an_update_are_refused(admin, engine, body):
    assert (admin.post("/update_weights_from_disk", json=body).status_code, engine.asked) == (400, [])


def test_the_prefix_cache_is_reset(admin, engine):
    assert admin.post("/reset_prefix_cache").json() == {"object": "prefix_cache.reset", "reset": True}
    assert engine.asked == [("reset_prefix_cache",)]
