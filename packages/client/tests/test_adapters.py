from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from octavo_client.wire_adapters import Adapter, AdapterUnloaded

if TYPE_CHECKING:
    from conftest import Caller

ADAPTER = Adapter(id="pirate", parent="m", digest="ab", rank=16, bytes=1024)


def test_each_method_asks_vllms_route(caller: Caller) -> None:
    adapters = caller.client(base_url="http://host/llm/v1").adapters
    assert caller.run(adapters.load("pirate", "pirate-v1")) == ADAPTER
    assert caller.body == {"lora_name": "pirate", "lora_path": "pirate-v1", "load_inplace": False}
    caller.run(adapters.load("pirate", "pirate-v2", load_inplace=True))
    assert caller.body == {"lora_name": "pirate", "lora_path": "pirate-v2", "load_inplace": True}
    assert caller.run(adapters.unload("pirate")) == AdapterUnloaded(id="pirate")
    assert caller.body == {"lora_name": "pirate"}
    assert [str(request.url) for request in caller.requests] == [
        "http://host/llm/v1/load_lora_adapter",
        "http://host/llm/v1/load_lora_adapter",
        "http://host/llm/v1/unload_lora_adapter",
    ]
    with pytest.raises(ValidationError):
        caller.run(adapters.load("", "x"))


def test_raw_and_streaming_responses_parse_into_the_usual_answers(caller: Caller) -> None:
    client = caller.client()
    for raw in (client.adapters.with_raw_response, client.with_raw_response.adapters):
        assert caller.run(raw.load("pirate", "x")).parse() == ADAPTER
    for streamed in (client.adapters.with_streaming_response, client.with_streaming_response.adapters):
        unloaded = caller.enter(streamed.unload("pirate"), lambda response: response.parse())
        assert unloaded == AdapterUnloaded(id="pirate")
