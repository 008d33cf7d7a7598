import re

import pytest

TEXT = "/v1/completions"
OPEN = ["/health", "/ready", "/version", "/metrics"]


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/models"])
def test_a_request_id_is_made(client, path):
    first, second = (client.get(path).headers["x-request-id"] for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


def test_a_request_id_that_came_is_echoed(client):
    assert client.get("/health", headers={"x-request-id": "my-id.7"}).headers["x-request-id"] == "my-id.7"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\xe9"], ids=["empty", "space", "long", "not ascii"])
def test_a_request_id_that_cannot_be_echoed_is_replaced(client, given):
    answer = client.get("/health", headers={"x-request-id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic secret"},
        {"authorization": "secret"},
        {"authorization": b"Bearer \xe9"},
        {"x-api-key": "wrong"},
    ],
    ids=["none", "wrong", "empty", "another scheme", "no scheme", "not ascii", "wrong x-api-key"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/tokenize"])
def test_without_a_known_key_it_is_401(make_client, engine, path, headers):
    response = make_client(engine, api_keys=("secret", "other")).get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer secret"}, {"authorization": "bearer other"}, {"x-api-key": "secret"}],
    ids=["first", "second", "x-api-key"],
)
def test_a_known_key_is_let_in(make_client, engine, headers):
    assert make_client(engine, api_keys=("secret", "other")).get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", OPEN)
def test_monitors_need_no_key(make_client, engine, path):
    assert make_client(engine, api_keys=("secret",)).get(path).status_code == 200


def test_without_keys_every_route_is_open(client):
    assert client.get("/v1/models").status_code == 200


PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "POST"}


def test_cors_is_off_by_default(client):
    answer = client.get("/v1/models", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers
    refused = client.options(TEXT, headers=PREFLIGHT)
    assert refused.status_code == 400
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert "access-control-allow-origin" not in refused.headers


def test_an_allowed_origin_is_reflected_and_needs_no_key_to_ask(make_client, engine):
    client = make_client(engine, allowed_origins=("https://a.example",), api_keys=("secret",))
    answer = client.options(TEXT, headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-credentials" not in answer.headers
    headers = PREFLIGHT | {"access-control-request-headers": "authorization, x-stainless-os"}
    assert client.options(TEXT, headers=headers).status_code == 200  # as OpenAI's client sends in a browser
    shown = client.get("/health", headers={"origin": "https://a.example"}).headers["access-control-expose-headers"]
    assert "x-ratelimit-remaining-tokens" in shown
    other = client.options(TEXT, headers=PREFLIGHT | {"origin": "https://b.example"})
    assert other.status_code == 400


def padded(size: int) -> bytes:
    return b'{"prompt":"a"' + b" " * (size - 14) + b"}"


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)], ids=["at the limit", "one over"])
def test_the_body_limit_is_exact(make_client, engine, size, status, chunked):
    body = padded(size)
    content = (body[i : i + 100] for i in range(0, size, 100)) if chunked else body
    client = make_client(engine, max_body_bytes=1000)
    response = client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    if status == 413:
        assert response.json()["error"]["code"] == "body_too_large"
        assert "1000 bytes" in response.json()["error"]["message"]
        assert response.headers["connection"] == "close"


def test_the_body_limit_holds_for_unknown_routes(make_client, engine):
    assert make_client(engine, max_body_bytes=10).post("/nothing", content=b"x" * 11).status_code == 413
