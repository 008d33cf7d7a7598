from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest
from pydantic import ValidationError

from octavo_client import InvalidAnswerError
from octavo_client.wire import DetokenizeResponse, TokenizeResponse

if TYPE_CHECKING:
    from conftest import Caller

TOKENIZED = TokenizeResponse(count=2, max_model_len=2048, tokens=[504, 3575])


def test_tokenize_sends_a_prompt_and_only_given_fields(caller: Caller) -> None:
    assert caller.run(caller.client().tokens.tokenize("The capital", model="m")) == TOKENIZED
    assert caller.requests[-1].method == "POST"
    assert caller.url == "http://localhost:8000/tokenize"
    assert caller.body == {"prompt": "The capital", "model": "m"}


def test_tokenize_sends_messages(caller: Caller) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    call = caller.client().tokens.tokenize(messages=iter(messages), add_generation_prompt=False, return_token_strs=True)
    assert caller.run(call) == TOKENIZED
    assert caller.body == {"messages": messages, "add_generation_prompt": False, "return_token_strs": True}


def test_detokenize_sends_tokens(caller: Caller) -> None:
    reply = caller.run(caller.client().tokens.detokenize(iter([504, 3575]), model="m"))
    assert reply == DetokenizeResponse(prompt="The capital")
    assert caller.url == "http://localhost:8000/detokenize"
    assert caller.body == {"tokens": [504, 3575], "model": "m"}


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("http://host/v1", "http://host/tokenize"),
        ("http://host/v1/", "http://host/tokenize"),
        ("http://host:81/a/b%20c/v1", "http://host:81/a/b%20c/tokenize"),
        ("http://host/myv1", "http://host/myv1/tokenize"),
        ("http://host", "http://host/tokenize"),
    ],
)
def test_root_paths_stand_beside_v1(caller: Caller, base_url: str, url: str) -> None:
    caller.run(caller.client(base_url=base_url).tokens.tokenize("a"))
    assert caller.url == url


def test_request_options_are_sent(caller: Caller) -> None:
    client = caller.client(api_key="key")
    caller.run(client.tokens.tokenize("a", extra_headers={"x-a": "1"}, extra_query={"q": "2"}, timeout=4.5))
    request = caller.requests[-1]
    assert caller.url.endswith("/tokenize?q=2")
    assert (request.headers["x-a"], request.headers["authorization"]) == ("1", "Bearer key")
    assert request.extensions["timeout"]["read"] == 4.5


def test_raw_response_parses_into_the_usual_answer(caller: Caller) -> None:
    client = caller.client()
    for tokens in (client.tokens.with_raw_response, client.with_raw_response.tokens):
        raw = caller.run(tokens.tokenize("a"))
        assert (raw.status_code, raw.parse()) == (200, TOKENIZED)
        assert caller.run(tokens.detokenize([1])).parse() == DetokenizeResponse(prompt="The capital")


def test_streaming_response_parses_into_the_usual_answer(caller: Caller) -> None:
    client = caller.client()
    for tokens in (client.tokens.with_streaming_response, client.with_streaming_response.tokens):
        assert caller.enter(tokens.tokenize("a"), lambda response: response.parse()) == TOKENIZED
        reply = caller.enter(tokens.detokenize([1]), lambda response: response.parse())
        assert reply == DetokenizeResponse(prompt="The capital")


def test_contradicting_arguments_are_refused_before_sending(caller: Caller) -> None:
    with pytest.raises(ValidationError, match="exactly one of prompt and messages was expected, neither came"):
        caller.run(caller.client().tokens.tokenize())
    with pytest.raises(ValidationError, match=r"tokens\.0"):
        caller.run(caller.client().tokens.detokenize([-1]))
    assert caller.requests == []


@pytest.mark.parametrize(
    "reply",
    [
        {"json": {"tokens": "none"}},
        {"text": "null", "headers": {"content-type": "application/json"}},
        {"html": "<html>welcome</html>" * 50},
    ],
    ids=["other fields", "null", "html"],
)
def test_answer_of_another_server_is_named(caller: Caller, reply: dict[str, Any]) -> None:
    caller.answer = lambda request: httpx2.Response(200, **reply)
    with pytest.raises(InvalidAnswerError, match=r"that is a TokenizeResponse, got .* does base_url name an Octavo"):
        caller.run(caller.client().tokens.tokenize("a"))


def test_refusals_raise_the_sdks_errors(caller: Caller) -> None:
    error: dict[str, Any] = {"message": "no model x", "type": "e", "param": "model", "code": "model_not_found"}
    caller.answer = lambda request: httpx2.Response(404, json={"error": error})
    with pytest.raises(openai.NotFoundError, match="no model x") as caught:
        caller.run(caller.client().tokens.tokenize("a", model="x"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
