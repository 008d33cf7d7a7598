from __future__ import annotations

from typing import TYPE_CHECKING

import httpx2
import pytest
from pydantic import ValidationError

from octavo_client import InvalidAnswerError
from octavo_client.wire_cache import (
    CachePin,
    CachePinDeleted,
    CachePinList,
    CachePinRequest,
    CacheWarmRequest,
    CacheWarmResponse,
    WarmedPrompt,
)

if TYPE_CHECKING:
    from conftest import Caller

PIN = CachePin(id="pin-1", pinned_tokens=32, blocks=2)
WARMED = CacheWarmResponse(data=[WarmedPrompt(index=0, prompt_tokens=40, cached_tokens=3, warm_tokens=32)], model="m")
DELETED = CachePinDeleted(id="pin-1")
MESSAGES = [{"role": "system", "content": "You keep a lighthouse."}]


def test_warm_sends_only_given_fields(caller: Caller) -> None:
    assert caller.run(caller.client().cache.warm(["one", "two"], cache_salt="a")) == WARMED
    assert (caller.requests[-1].method, caller.url) == ("POST", "http://localhost:8000/v1/cache/warm")
    assert caller.body == {"prompt": ["one", "two"], "cache_salt": "a"}
    caller.run(caller.client().cache.warm(messages=iter(MESSAGES), model="m"))
    assert caller.body == {"messages": MESSAGES, "model": "m"}
    caller.run(caller.client().cache.warm([[1], [2, 3]]))
    assert caller.body == {"prompt": [[1], [2, 3]]}


def test_pin_list_and_unpin(caller: Caller) -> None:
    client = caller.client()
    assert caller.run(client.cache.pin([1, 2], cache_salt="a")) == PIN
    assert (caller.requests[-1].method, caller.url) == ("POST", "http://localhost:8000/v1/cache/pins")
    assert caller.body == {"prompt": [1, 2], "cache_salt": "a"}
    assert caller.run(client.cache.pins()).data == [PIN]
    assert (caller.requests[-1].method, caller.url) == ("GET", "http://localhost:8000/v1/cache/pins")
    caller.run(client.cache.pins(cache_salt="team a"))
    assert caller.requests[-1].url.params["cache_salt"] == "team a"
    assert caller.run(client.cache.unpin("pin-1", cache_salt="a", extra_query={"q": "2"})) == DELETED
    assert (caller.requests[-1].method, caller.url) == (
        "DELETE",
        "http://localhost:8000/v1/cache/pins/pin-1?q=2&cache_salt=a",
    )
    caller.answer = lambda request: httpx2.Response(200, json=DELETED.model_dump())
    caller.run(client.cache.unpin("../models"))
    assert caller.url == "http://localhost:8000/v1/cache/pins/..%2Fmodels"


def test_raw_and_streaming_responses_parse_into_the_usual_answers(caller: Caller) -> None:
    client = caller.client()
    for cache in (client.cache.with_raw_response, client.with_raw_response.cache):
        assert caller.run(cache.warm("a")).parse() == WARMED
        assert caller.run(cache.pin("a")).parse() == PIN
        assert caller.run(cache.pins()).parse().data == [PIN]
        assert caller.run(cache.unpin("pin-1")).parse() == DELETED
    for cache in (client.cache.with_streaming_response, client.with_streaming_response.cache):
        assert caller.enter(cache.warm("a"), lambda response: response.parse()) == WARMED
        assert caller.enter(cache.pin("a"), lambda response: response.parse()) == PIN
        assert caller.enter(cache.pins(), lambda response: response.parse()).data == [PIN]
        assert caller.enter(cache.unpin("pin-1"), lambda response: response.parse()) == DELETED


def test_contradicting_arguments_are_refused_before_sending(caller: Caller) -> None:
    for call in (
        lambda: caller.run(caller.client().cache.warm()),
        lambda: caller.run(caller.client().cache.warm("a", messages=MESSAGES)),
        lambda: caller.run(caller.client().cache.pin(messages=[])),
        lambda: caller.run(caller.client().cache.pin("a", cache_salt="")),
        lambda: caller.run(caller.client().cache.pin([-1])),
    ):
        with pytest.raises(ValidationError):
            call()
    assert caller.requests == []


def test_an_answer_of_another_server_is_an_error(caller: Caller) -> None:
    caller.answer = lambda request: httpx2.Response(200, json={"ok": True})
    with pytest.raises(InvalidAnswerError, match="CachePin"):
        caller.run(caller.client().cache.pin("a"))


def test_every_field_is_described() -> None:
    for kind in (CacheWarmRequest, CachePinRequest, CacheWarmResponse, WarmedPrompt, CachePin, CachePinList):
        for name, field in kind.model_fields.items():
            assert field.description or name == "object", f"{kind.__name__}.{name}"
