"""LangChain's OpenAI package, unchanged, against the served demo model."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")  # else there may be members that nobody asked for, as many as fit

    name: str = Field(max_length=12)


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: str = Field(max_length=12)


@tool(args_schema=Place)
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"sunny in {city}"


@pytest.fixture
def options(url):
    return {"model": "smollm2", "base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}


@pytest.fixture
def chat(options):
    return ChatOpenAI(temperature=0, max_tokens=80, **options)


def test_an_answer_and_its_stream_say_the_same(chat):
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole.content


def test_a_batch_is_answered_in_order(chat):
    assert len({answer.content for answer in asyncio.run(chat.abatch([QUESTION] * 3))}) == 1


def test_a_bound_tool_is_called_and_its_result_taken(chat):
    bound = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False, strict=True)
    answer = bound.invoke(QUESTION)
    (call,) = answer.tool_calls
    assert (call["name"], set(call["args"])) == ("get_weather", {"city"})
    turns = [HumanMessage(QUESTION), answer, ToolMessage("sunny", tool_call_id=call["id"])]
    assert isinstance(chat.invoke(turns), AIMessage)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_a_pydantic_object(chat, method):
    assert isinstance(chat.with_structured_output(City, method=method).invoke(QUESTION), City)


def test_text_completions(options):
    assert OpenAI(temperature=0, max_tokens=8, **options).invoke("One, two,")


def test_embeddings(options):
    # LangChain counts tokens itself unless told not to, and knows OpenAI's own models alone.
    vectors = OpenAIEmbeddings(check_embedding_ctx_length=False, **options).embed_documents(["paper", "ink"])
    assert [len(vector) for vector in vectors] == [576, 576]
