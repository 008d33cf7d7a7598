from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest

from octavo_client.wire_server import Health, Ready, Version

if TYPE_CHECKING:
    from conftest import Caller

ANSWERS = {
    "health": Health(),
    "ready": Ready(models=["m"]),
    "version": Version(version="0.1.0", packages={"octavo-engine": "0.1.0"}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_state_is_asked_at_the_root(caller: Caller, name: str) -> None:
    client = caller.client(base_url="http://host/llm/v1")
    assert caller.run(getattr(client.server, name)()) == ANSWERS[name]
    assert (caller.requests[-1].method, caller.url) == ("GET", f"http://host/llm/{name}")
    assert caller.requests[-1].content == b""


@pytest.mark.parametrize("name", ANSWERS)
def test_raw_and_streaming_responses_parse_into_the_usual_answer(caller: Caller, name: str) -> None:
    client = caller.client()
    for raw in (client.server.with_raw_response, client.with_raw_response.server):
        assert caller.run(getattr(raw, name)()).parse() == ANSWERS[name]
    for streamed in (client.server.with_streaming_response, client.with_streaming_response.server):
        assert caller.enter(getattr(streamed, name)(), lambda response: response.parse()) == ANSWERS[name]


def test_request_options_are_sent(caller: Caller) -> None:
    caller.run(caller.client().server.ready(extra_headers={"x-a": "1"}, extra_query={"q": "2"}, timeout=0.5))
    request = caller.requests[-1]
    assert caller.url.endswith("/ready?q=2")
    assert (request.headers["x-a"], request.extensions["timeout"]["read"]) == ("1", 0.5)


def test_a_loading_server_raises_with_its_reason(caller: Caller) -> None:
    error: dict[str, Any] = {"message": "loading", "type": "server_error", "param": None, "code": "loading"}
    caller.answer = lambda request: httpx2.Response(503, json={"error": error})
    with pytest.raises(openai.InternalServerError, match="loading") as caught:
        caller.run(caller.client(max_retries=0).server.ready())
    assert (caught.value.status_code, caught.value.code) == (503, "loading")


def test_retries_wait_until_a_server_is_ready(caller: Caller) -> None:
    def load(request: httpx2.Request) -> httpx2.Response:
        if len(caller.requests) < 4:
            return httpx2.Response(503, json={}, headers={"retry-after-ms": "1"})
        return httpx2.Response(200, json={"status": "ready", "models": ["m"]})

    caller.answer = load
    assert caller.run(caller.client().with_options(max_retries=5).server.ready()).models == ["m"]
    assert len(caller.requests) == 4
