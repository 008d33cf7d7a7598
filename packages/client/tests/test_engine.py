from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest
from pydantic import ValidationError

from octavo_client import InvalidAnswerError
from octavo_client.wire_admin import MemoryReport, PrefixCacheReset, SleepState

if TYPE_CHECKING:
    from conftest import Caller

REPORT = MemoryReport(
    sleep_level=1, weights_digest="ab", bytes_before=1000, bytes_after=400, freed_bytes=600, seconds=0.5
)


def test_each_method_asks_its_route_beside_v1(caller: Caller) -> None:
    engine = caller.client(base_url="http://host/llm/v1").engine
    assert caller.run(engine.sleep()) == REPORT
    assert caller.run(engine.sleep(2, mode="abort")) == REPORT
    assert caller.run(engine.wake_up()) == REPORT
    assert caller.run(engine.wake_up(tags=["weights", "kv_cache"])) == REPORT
    assert caller.run(engine.is_sleeping()) == SleepState(is_sleeping=True, level=1)
    assert caller.run(engine.reset_prefix_cache()) == PrefixCacheReset()
    urls = [(request.method, str(request.url).removeprefix("http://host/llm/")) for request in caller.requests]
    assert urls == [
        ("POST", "sleep?level=1"),
        ("POST", "sleep?level=2&mode=abort"),
        ("POST", "wake_up"),
        ("POST", "wake_up?tags=weights%2Ckv_cache"),
        ("GET", "is_sleeping"),
        ("POST", "reset_prefix_cache"),
    ]


def test_weights_are_named_in_the_body(caller: Caller) -> None:
    engine = caller.client().engine
    assert caller.run(engine.update_weights("/new.gguf")) == REPORT
    assert caller.body == {"model_path": "/new.gguf"}
    caller.run(engine.update_weights("/new.gguf", mode="wait"))
    assert caller.body == {"model_path": "/new.gguf", "mode": "wait"}
    with pytest.raises(ValidationError):
        caller.run(engine.update_weights(""))


def test_raw_and_streaming_responses_parse_into_the_usual_answers(caller: Caller) -> None:
    client = caller.client()
    for raw in (client.engine.with_raw_response, client.with_raw_response.engine):
        assert caller.run(raw.sleep()).parse() == REPORT
    for streamed in (client.engine.with_streaming_response, client.with_streaming_response.engine):
        assert caller.enter(streamed.wake_up(), lambda response: response.parse()) == REPORT


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, openai.BadRequestError), (403, openai.PermissionDeniedError), (409, openai.ConflictError)],
)
def test_refusals_are_the_sdks_errors(caller: Caller, status: int, kind: type[Exception]) -> None:
    error: dict[str, Any] = {"message": "no", "type": "invalid_request_error", "param": None, "code": "x"}
    caller.answer = lambda request: httpx2.Response(status, json={"error": error}, headers={"x-should-retry": "false"})
    with pytest.raises(kind):
        caller.run(caller.client().engine.sleep())
    assert len(caller.requests) == 1


def test_another_servers_answer_is_told_apart(caller: Caller) -> None:
    caller.answer = lambda request: httpx2.Response(200, json={})  # vLLM's
    with pytest.raises(InvalidAnswerError, match="MemoryReport"):
        caller.run(caller.client().engine.sleep())
