"""LiteLLM, unchanged, against the served demo model."""

from __future__ import annotations

import json

import litellm
import pytest
from pydantic import BaseModel, Field

USER = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: str = Field(max_length=12)


@pytest.fixture
def asked(url):
    return {"model": "openai/smollm2", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 40}


def test_a_chat_and_its_stream_say_the_same(asked):
    whole = litellm.completion(messages=USER, **asked)
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0
    chunks = list(litellm.completion(messages=USER, stream=True, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert litellm.stream_chunk_builder(chunks, messages=USER).choices[0].message.content == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_tool_is_called(asked, stream):
    answer = litellm.completion(messages=USER, tools=[WEATHER], tool_choice="required", stream=stream, **asked)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=USER)
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("get_weather", {"city"})


def test_structured_output_fits_its_model(asked):
    answer = litellm.completion(messages=USER, response_format=City, **asked)
    assert City.model_validate_json(answer.choices[0].message.content)


def test_embeddings(asked, url):
    answer = litellm.embedding(
        model="openai/smollm2", input=["paper"], api_base=f"{url}/v1", api_key="none", encoding_format="float"
    )
    assert len(answer.data[0]["embedding"]) == 576


def test_text_completions(asked):
    asked["model"] = "text-completion-openai/smollm2"
    assert litellm.text_completion(prompt="One, two,", **asked).choices[0].text


def test_anthropics_provider_reaches_messages(asked, url):
    anthropic = asked | {"model": "anthropic/smollm2", "api_base": url}
    assert "Paris" in litellm.completion(messages=USER, **anthropic).choices[0].message.content


def test_mistakes_are_litellms_own_errors(asked):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=USER, **asked | {"model": "openai/nope"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=USER, **asked | {"max_tokens": 99_999})
