"""The Anthropic SDK, unchanged, against the served demo model."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

USER = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = {"model": "smollm2", "max_tokens": 24, "messages": USER, "extra_body": {"temperature": 0}}
WEATHER = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_and_its_stream_say_the_same(client):
    whole = client.messages.create(**ASKED)
    assert "Paris" in whole.content[0].text
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_a_demanded_tool_is_used_and_its_result_taken(client):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked = ASKED | {"max_tokens": 60, "tools": [WEATHER]}
    whole = client.messages.create(**asked, tool_choice=choice)
    (use,) = [block for block in whole.content if block.type == "tool_use"]
    assert (use.name, set(use.input), whole.stop_reason) == ("get_weather", {"city"}, "tool_use")
    with client.messages.stream(**asked, tool_choice=choice) as stream:
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert streamed.input == use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    turns = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**asked | {"messages": turns}).stop_reason


def test_stop_sequences_are_named(client):
    answer = client.messages.create(**ASKED, stop_sequences=["Paris"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "Paris")


def test_tokens_are_counted(client):
    counted = client.messages.count_tokens(model="smollm2", messages=USER).input_tokens
    usage = client.messages.create(**ASKED).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_mistakes_are_the_sdks_own_errors(client):
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**ASKED | {"model": "nope"})
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(**ASKED | {"max_tokens": 5000})
