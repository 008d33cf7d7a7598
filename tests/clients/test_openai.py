"""The openai SDK, unchanged, against the served demo model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel, Field

MODEL = "smollm2"
USER = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class City(BaseModel):
    name: str = Field(max_length=12)
    inhabitants: int = Field(ge=0, le=99_999_999)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "octavo"


def test_a_chat_and_its_stream_say_the_same(client):
    whole = client.chat.completions.create(messages=USER, **GREEDY)
    assert "Paris" in whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(messages=USER, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_gathers_the_events(client):
    with client.chat.completions.stream(messages=USER, **GREEDY) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "Paris" in final.choices[0].message.content


def test_a_demanded_tool_is_called_whole_and_streamed(client):
    asked = GREEDY | {"messages": USER, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    whole = client.chat.completions.create(parallel_tool_calls=False, **asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("get_weather", {"city"})
    with client.chat.completions.stream(parallel_tool_calls=False, **asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    assert streamed.function.parsed_arguments == json.loads(call.function.arguments)


def test_the_result_of_a_tool_is_taken(client):
    call = {
        "id": "call_123456789",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "X"}'},
    }
    turns = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]
    assert client.chat.completions.create(messages=turns, **GREEDY).choices[0].message.content


def test_structured_output_is_parsed_by_pydantic(client):
    asked = GREEDY | {"messages": USER, "max_tokens": 80, "response_format": City}
    parsed = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(parsed, City)
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_text_completions_with_logprobs(client):
    answer = client.completions.create(prompt="One, two,", logprobs=2, echo=True, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs[0] is None
    text = "".join(c.choices[0].text for c in client.completions.create(prompt="One, two,", stream=True, **GREEDY))
    assert answer.choices[0].text == "One, two," + text


def test_responses_are_made_streamed_and_kept(client):
    asked = {"model": MODEL, "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 24}
    made = client.responses.create(**asked)
    assert "Paris" in made.output_text
    with client.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text == made.output_text
    assert {"response.created", "response.output_text.delta"} <= kinds
    assert client.responses.retrieve(made.id).output_text == made.output_text
    assert len(client.responses.input_items.list(made.id).data) == 1
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_response_is_parsed_by_pydantic(client):
    parsed = client.responses.parse(model=MODEL, input="Describe Paris.", text_format=City, max_output_tokens=80)
    assert isinstance(parsed.output_parsed, City)


def test_a_batch_answers_the_requests_of_a_file(client):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": USER, **GREEDY}}
    file = client.files.create(file=("requests.jsonl", json.dumps(line).encode()), purpose="batch")
    assert file.id in [listed.id for listed in client.files.list()]
    made = client.batches.create(input_file_id=file.id, endpoint=line["url"], completion_window="24h")
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(made.id)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    answer = json.loads(client.files.content(batch.output_file_id).text)
    assert "Paris" in answer["response"]["body"]["choices"][0]["message"]["content"]
    client.files.delete(file.id)


def test_embeddings_come_in_both_encodings(client):
    packed = client.embeddings.create(model=MODEL, input=["printing", "paper"])  # the SDK asks for base64
    plain = client.embeddings.create(model=MODEL, input=["printing", "paper"], encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-4)


def test_the_asynchronous_client_runs_requests_side_by_side(url):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answers = [client.chat.completions.create(messages=USER, **GREEDY) for _ in range(4)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    assert len(set(asyncio.run(run()))) == 1


def test_mistakes_are_the_sdks_own_errors(client):
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="nope", messages=USER)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=USER, **GREEDY | {"temperature": 9})
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(messages=USER, **GREEDY | {"max_tokens": 99_999})
    assert too_long.value.code == "context_length_exceeded"
