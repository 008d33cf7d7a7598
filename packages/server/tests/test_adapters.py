"""Adapters over HTTP: as models, and the routes that load and unload them."""

import pytest

from octavo_engine.errors import InvalidAdapter, InvalidConfig, UnknownAdapter
from octavo_server.adapters import AdapterModule, allowed_path, parse_modules

BASE = "org/fake-model"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def admin(make_client, engine, tmp_path):
    (tmp_path / "adapters").mkdir()
    client = make_client(engine, admin_api_key="root", lora_dir=tmp_path / "adapters")
    client.headers["authorization"] = "Bearer root"
    return client


def load(client, name="pirate", path="pirate-v1", **more):
    return client.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


def error_of(response):
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def test_an_adapter_is_loaded_listed_used_and_unloaded(admin, engine, tmp_path):
    assert load(admin).json() == {
        "id": "pirate", "object": "adapter", "parent": BASE, "digest": "ab", "rank": 16, "bytes": 1024,
    }  # fmt: skip
    assert engine.asked == [("load", "pirate", str(tmp_path / "adapters/pirate-v1"), False)]
    base, card = admin.get("/v1/models").json()["data"]
    assert (base["id"], "parent" in base) == (BASE, False)
    assert (card["id"], card["parent"]) == ("pirate", BASE)
    assert admin.get("/v1/models/pirate").json() == card
    assert admin.post(UNLOAD, json={"lora_name": "pirate"}).json() == {
        "id": "pirate", "object": "adapter.unloaded", "unloaded": True,
    }  # fmt: skip
    assert len(admin.get("/v1/models").json()["data"]) == 1
    assert error_of(admin.post(UNLOAD, json={"lora_name": "pirate"})) == (404, "model", "adapter_not_found")


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "use_beam_search": True, "n": 2, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v1/cache/warm", {"prompt": "a"}),
        ("/v1/cache/pins", {"prompt": "a" * 40}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_name_of_an_adapter_is_a_models_in_every_route(admin, engine, path, body):
    load(admin)
    for model, adapter in (("pirate", "pirate"), (BASE, None)):
        engine.requests.clear()
        response = admin.post(path, json={"model": model, **body})
        assert response.status_code == 200, response.text
        assert response.json().get("model", model) == model
        assert {request.adapter for request in engine.requests} == {adapter}


def test_a_model_that_is_neither_is_not_found(admin):
    load(admin)
    response = admin.post("/v1/completions", json={"model": "privateer", "prompt": "a"})
    assert error_of(response) == (404, "model", "model_not_found")
    assert f"this server has {BASE}, pirate" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x", "link", "a\0b", "x" * 4000, "loop"])
def test_a_path_outside_the_folder_is_refused(admin, engine, tmp_path, path):
    (tmp_path / "adapters/link").symlink_to(tmp_path)
    (tmp_path / "adapters/loop").symlink_to(tmp_path / "adapters/loop")
    response = load(admin, path=path)
    if path.startswith("x"):  # a name too long is for the engine to refuse, but leads nowhere else
        assert response.status_code in (200, 400)
        return
    assert error_of(response) == (400, "lora_path", "path_not_allowed")
    assert str(tmp_path) not in response.text
    assert engine.asked == []


def test_paths_inside_the_folder_are_taken_as_they_are_meant(tmp_path):
    (tmp_path / "a").mkdir()
    for path in ("a", "./a", "a/../a", str(tmp_path / "a")):
        assert allowed_path(path, tmp_path) == str(tmp_path / "a")


def test_without_a_folder_nothing_is_loaded(make_client, engine):
    client = make_client(engine, local_only=True)
    assert error_of(load(client)) == (400, "lora_path", "path_not_allowed")


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_they_are_for_administrators(make_client, engine, path):
    client = make_client(engine, admin_api_key="root", api_keys=("user",))
    for key, status in (("user", 403), ("nobody", 401)):
        response = client.post(path, headers={"authorization": f"Bearer {key}"}, json={})
        assert (response.status_code, engine.asked) == (status, [])


def test_what_is_wrong_with_the_files_is_told_to_whoever_named_them(admin, engine, tmp_path):
    engine.unreadable[str(tmp_path / "adapters/bad")] = InvalidAdapter("r: expected one above 0, found 0")
    response = load(admin, path="bad")
    assert error_of(response) == (400, "lora_path", "invalid_adapter")
    assert "expected one above 0" in response.json()["error"]["message"]
    assert error_of(load(admin, name=BASE)) == (400, "lora_name", "adapter_exists")
    assert error_of(load(admin, name=""))[:2] == (400, "lora_name")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownAdapter("no adapter 'pirate' is served"), 404, "adapter_not_found"),
        (InvalidAdapter("/secret/pirate: the files have changed"), 500, "invalid_adapter"),
    ],
    ids=["unloaded meanwhile", "files changed meanwhile"],
)
def test_an_adapter_that_is_lost_meanwhile_ends_its_request_alone(admin, engine, monkeypatch, error, status, code):
    load(admin)
    check = engine.check_ready
    monkeypatch.setattr(engine, "check_ready", lambda: (_ for _ in ()).throw(error))
    response = admin.post("/v1/completions", json={"model": "pirate", "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "/secret" not in response.text
    monkeypatch.setattr(engine, "check_ready", check)
    assert admin.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_modules_are_names_with_paths_or_json():
    given = ["a=/x/y=z", '{"name": "b", "path": "c", "base_model_name": "m"}']
    assert parse_modules(given) == (AdapterModule("a", "/x/y=z"), AdapterModule("b", "c"))
    for wrong in ("a", "=x", "a=", '{"name": "a"}', "{", '{"name": 1, "path": "x"}'):
        with pytest.raises(InvalidConfig, match="--lora-modules takes name=path"):
            parse_modules([wrong])
    with pytest.raises(InvalidConfig, match="'a' comes twice"):
        parse_modules(["a=x", "a=y"])
