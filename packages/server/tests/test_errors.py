import json
import time

import pytest

from octavo_engine.errors import (
    EngineBusy,
    EngineDead,
    EngineError,
    EngineStuck,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
    RequestLost,
)
from octavo_server.errors import ApiError, to_api_error

TEXT, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
USER = {"role": "user", "content": "hi"}


def check_error(response, status, *, param=None, code=None):
    """The error object of a response, after checks that hold for every error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert len(response.content) < 32_000
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error


@pytest.mark.parametrize("path", [TEXT, CHAT, EMBED, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", ["[1]", '"x"', "42", "null", "true", "", "{", '{"a":}', "\xff", "[" * 5000])
def test_a_body_that_is_no_json_object_is_400(client, path, body):
    check_error(client.post(path, content=body.encode("latin-1")), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", -1),
        ("n", 9),
        ("n", 100_000_000),
        ("n", 1.5),
        ("n", "1"),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", -1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 50),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 10**30),
        ("seed", "x"),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 5),
        ("stop", 5),
        ("stop", [5]),
        ("stop_token_ids", [258]),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("max_tokens", -1),
        ("max_tokens", "many"),
        ("max_tokens", 10**400),
        ("stream", "yes"),
        ("stream", 1),
        ("model", 42),
        ("priority", 2**40),
        ("cache_salt", ""),
        ("echo", "no"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_wrong_value_is_400_and_names_the_field(client, field, value):
    error = check_error(client.post(TEXT, json={"prompt": "abc", "max_tokens": 16, field: value}), 400, param=field)
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_not_a_number_is_400(client, field, number):
    response = client.post(TEXT, content=f'{{"prompt":"x","{field}":{number}}}')
    assert response.status_code == 400
    assert response.json()["error"]["param"] in (field, None)


@pytest.mark.parametrize("body", [r'{"prompt":"\ud800"}', r'{"prompt":"a\udc00b"}'])
def test_a_lone_surrogate_is_400(client, body):
    check_error(client.post(TEXT, content=body), 400)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        (["a", ""], "prompt[1]"),
        ([[]], "prompt[0]"),
        ([[1], []], "prompt[1]"),
        ([1, "a"], "prompt[0]"),
        (["a", [1]], "prompt"),
        ([1.5], "prompt[0]"),
        ([True], "prompt[0]"),
        (5, "prompt"),
        ({"text": "a"}, "prompt"),
        ([258], "prompt"),
        ([-1], "prompt"),
        ([[1], [10**20]], "prompt"),
    ],
    ids=str,
)
def test_a_wrong_prompt_is_400(client, prompt, param):
    check_error(client.post(TEXT, json={"prompt": prompt}), 400, param=param)


def test_a_missing_prompt_is_400(client):
    assert "required" in check_error(client.post(TEXT, json={}), 400, param="prompt")["message"]


def test_an_id_out_of_the_vocabulary_says_so(client):
    error = check_error(client.post(TEXT, json={"prompt": [1, 258]}), 400, param="prompt")
    assert "out of vocabulary" in error["message"]


def test_too_many_choices_over_all_prompts_are_400(client):
    check_error(client.post(TEXT, json={"prompt": ["a"] * 300, "n": 8}), 400, param="prompt")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "x" * 200}, "prompt"),
        (TEXT, {"prompt": "x" * 9000}, "prompt"),
        (TEXT, {"prompt": "x" * 195, "max_tokens": 6}, "prompt"),
        (TEXT, {"prompt": "x" * 200, "max_tokens": 0, "echo": True}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
        (CHAT, {"messages": [USER], "max_tokens": 1000}, "messages"),
        (EMBED, {"input": "x" * 201}, "input"),
    ],
    ids=["at the limit", "far over", "with max_tokens", "prompt only", "chat", "chat max_tokens", "embedding"],
)
def test_what_does_not_fit_the_context_is_400_before_it_is_queued(client, engine, path, body, param):
    error = check_error(client.post(path, json=body), 400, param=param, code="context_length_exceeded")
    assert error["message"].startswith("This model's maximum context length is 200 tokens. However, ")
    assert engine.requests == []


@pytest.mark.parametrize("messages", [None, [], "hi", {}, [5]], ids=str)
def test_wrong_messages_are_400(client, messages):
    response = client.post(CHAT, json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_chat_needs_room_for_a_token(client, field, value):
    check_error(client.post(CHAT, json={"messages": [USER], field: value}), 400, param=field)


UNSUPPORTED = [
    (TEXT, "suffix", "end"),
    (CHAT, "functions", [{}]),
    (CHAT, "guided_json", {}),
    (CHAT, "modalities", ["audio"]),
    (CHAT, "chat_template", "{{ x }}"),
    (EMBED, "dimensions", 2),
]


@pytest.mark.parametrize(("path", "field", "value"), UNSUPPORTED, ids=[f"{p}-{f}-{v}" for p, f, v in UNSUPPORTED])
def test_an_unsupported_feature_is_refused_by_name(client, path, field, value):
    body = {TEXT: {"prompt": "a"}, CHAT: {"messages": [USER]}, EMBED: {"input": "a"}}[path]
    error = check_error(client.post(path, json={**body, field: value}), 400, param=field, code="unsupported_parameter")
    assert "not supported" in error["message"]


@pytest.mark.parametrize("path", [TEXT, CHAT, EMBED, "/tokenize", "/detokenize"])
def test_an_unknown_model_is_404(client, path):
    body = {"prompt": "a", "messages": [USER], "input": "a", "tokens": [1]}
    if path == "/tokenize":
        del body["messages"]
    response = client.post(path, json={**body, "model": "gpt-x"})
    check_error(response, 404, param="model", code="model_not_found")


def test_an_unknown_route_is_404(client):
    assert "/v1/nothing" in check_error(client.get("/v1/nothing"), 404)["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"), [("GET", TEXT, "POST"), ("DELETE", CHAT, "POST"), ("POST", "/health", "GET")]
)
def test_a_wrong_method_is_405_with_allow(client, method, path, allow):
    response = client.request(method, path)
    check_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_of_another_type_is_415(client, content_type):
    check_error(client.post(TEXT, content=b"{}", headers={"content-type": content_type}), 415)


def test_a_compressed_body_is_415(client):
    check_error(client.post(TEXT, content=b"{}", headers={"content-encoding": "gzip"}), 415)


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"],
)
def test_json_types_are_taken(client, content_type):
    response = client.post(TEXT, content=b'{"prompt":"a"}', headers={"content-type": content_type})
    assert response.status_code == 200


def test_thousands_of_mistakes_make_a_short_answer(client):
    body = {
        "prompt": "a",
        "stop_token_ids": ["x" * 500] * 1000,
        **dict.fromkeys(("n", "seed", "top_p"), "y" * 5000),
    }
    response = client.post(TEXT, json=body)
    assert response.status_code == 400
    assert len(response.content) < 1000


def test_a_long_string_is_cut_and_a_container_described(client):
    error = check_error(client.post(TEXT, json={"prompt": "a", "seed": "z" * 10_000}), 400, param="seed")
    assert len(error["message"]) < 200
    error = check_error(client.post(TEXT, json={"prompt": "a", "seed": [1] * 500}), 400, param="seed")
    assert "a list of 500 items" in error["message"]


def test_a_huge_n_is_refused_fast(client):
    started = time.monotonic()
    check_error(client.post(TEXT, json={"prompt": "a", "n": 100_000_000}), 400, param="n")
    assert time.monotonic() - started < 1


def test_the_server_serves_on_after_each_mistake(client):
    for body in ({"prompt": ""}, {"prompt": [999]}, {"prompt": "x" * 999}):
        assert client.post(TEXT, json=body).status_code == 400
    assert client.post(TEXT, json={"prompt": "a"}).status_code == 200


def test_a_request_that_the_engine_cannot_compute_is_500_without_details(client, engine):
    engine.fail_after = 1
    error = check_error(client.post(TEXT, json={"prompt": "a"}), 500, code="request_failed")
    assert "secret" not in error["message"]
    assert error["type"] == "server_error"


@pytest.mark.parametrize("path", [TEXT, CHAT, EMBED, "/health", "/ready"])
def test_a_dead_engine_is_503_with_retry_after(client, engine, path):
    engine.broken = EngineDead("the engine stopped: OSError: /secret/path")
    body = {"prompt": "a", "messages": [USER], "input": "a", "stream": True}
    if path == EMBED:
        del body["stream"]
    response = client.post(path, json=body) if path.startswith("/v1") else client.get(path)
    error = check_error(response, 503, code="engine_dead")
    assert "secret" not in error["message"]
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", [TEXT, CHAT, EMBED, "/health", "/ready"])
def test_a_stuck_engine_is_503_until_it_goes_on(client, engine, path):
    body = {"prompt": "a", "messages": [USER], "input": "a"}
    engine.broken = EngineStuck("the engine has made no step for 130 s")
    for status in (503, 200):
        response = client.post(path, json=body) if path.startswith("/v1") else client.get(path)
        assert response.status_code == status
        if status == 503:
            check_error(response, 503, code="engine_stuck")
            assert int(response.headers["retry-after"]) > 0
        engine.broken = None
    assert len(engine.requests) == path.startswith("/v1")


def test_an_unforeseen_error_is_500_without_details(make_client, engine):
    engine.broken = ZeroDivisionError("/secret/path")
    response = make_client(engine).post(TEXT, json={"prompt": "a"})
    error = check_error(response, 500, code="internal_error")
    assert "secret" not in error["message"]
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (InvalidRequest("m", param="top_p"), 400, "top_p", None),
        (PromptTooLong("m"), 400, "prompt", "context_length_exceeded"),
        (RequestFailed("m"), 500, None, "request_failed"),
        (RequestLost("m"), 503, None, "request_lost"),
        (EngineBusy("m"), 503, None, "engine_busy"),
        (EngineStuck("m"), 503, None, "engine_stuck"),
        (EngineDead("m"), 503, None, "engine_dead"),
        (EngineError("m"), 500, None, "engine_error"),
        (RuntimeError("m"), 500, None, "internal_error"),
        (ApiError(418, "m", param="p", code="c"), 418, "p", "c"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else None,
)
def test_the_table_answers_each_exception(error, status, param, code):
    answer = to_api_error(error)
    assert (answer.status, answer.param, answer.code) == (status, param, code)


@pytest.mark.parametrize(("error", "traced"), [(EngineDead("gone"), False), (RuntimeError("gone"), True)])
def test_only_what_is_unforeseen_is_logged_with_a_traceback(caplog, error, traced):
    to_api_error(error)
    (record,) = caplog.records
    assert "gone" in record.getMessage()
    assert bool(record.exc_info) is traced


def test_a_long_message_is_cut():
    assert len(ApiError(400, "x" * 100_000).message) == 2000


def test_error_bodies_are_json():
    assert json.loads(json.dumps(ApiError(400, "m").body())) == {
        "error": {"message": "m", "type": "invalid_request_error", "param": None, "code": None}
    }
