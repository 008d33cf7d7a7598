from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest

from octavo_client import InvalidAnswerError
from octavo_client.wire import ReleasedRequest

if TYPE_CHECKING:
    from conftest import Caller


def test_a_kept_answer_is_released_by_its_id(caller: Caller) -> None:
    client = caller.client(base_url="http://host/llm/v1")
    assert caller.run(client.requests.release("cmpl-1-0")) == ReleasedRequest(id="cmpl-1-0")
    assert (caller.requests[-1].method, caller.url) == ("DELETE", "http://host/llm/v1/requests/cmpl-1-0")


def test_an_id_stays_one_part_of_the_path(caller: Caller) -> None:
    caller.run(caller.client().requests.release("a/../b?c"))
    assert caller.requests[-1].url.raw_path.decode().endswith("/v1/requests/a%2F..%2Fb%3Fc")


def test_raw_and_streaming_responses_parse_into_the_usual_answer(caller: Caller) -> None:
    client = caller.client()
    for raw in (client.requests.with_raw_response, client.with_raw_response.requests):
        assert caller.run(raw.release("a")).parse() == ReleasedRequest(id="a")
    for streamed in (client.requests.with_streaming_response, client.with_streaming_response.requests):
        assert caller.enter(streamed.release("a"), lambda response: response.parse()) == ReleasedRequest(id="a")


def test_an_unknown_answer_raises_not_found(caller: Caller) -> None:
    error: dict[str, Any] = {"message": "no", "type": "invalid_request_error", "param": "request_id", "code": "x"}
    caller.answer = lambda request: httpx2.Response(404, json={"error": error})
    with pytest.raises(openai.NotFoundError):
        caller.run(caller.client().requests.release("a"))


def test_another_servers_answer_is_told_apart(caller: Caller) -> None:
    caller.answer = lambda request: httpx2.Response(200, json={"deleted": True})
    with pytest.raises(InvalidAnswerError, match="ReleasedRequest"):
        caller.run(caller.client().requests.release("a"))


def test_an_empty_id_is_refused(caller: Caller) -> None:
    with pytest.raises(ValueError, match="empty"):
        caller.run(caller.client().requests.release(""))


def test_a_timeline_is_asked_for_by_the_id_of_the_answer(caller: Caller) -> None:
    client = caller.client()
    found = caller.run(client.requests.timeline("cmpl-1"))
    assert (caller.requests[-1].method, caller.url) == ("GET", "http://localhost:8000/v1/requests/cmpl-1/timeline")
    assert (found.state, found.waits[0].reasons, found.chunks[0].seconds) == ("running", {"rows": 0.25}, None)
    assert caller.run(client.requests.with_raw_response.timeline("cmpl-1")).parse() == found
    with pytest.raises(ValueError, match="empty"):
        caller.run(client.requests.timeline(""))
