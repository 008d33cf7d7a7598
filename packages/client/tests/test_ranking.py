from __future__ import annotations

from typing import TYPE_CHECKING

import httpx2
import pytest
from pydantic import ValidationError

from octavo_client import InvalidAnswerError
from octavo_client.wire_rerank import DocumentText, RerankResult, ScoreData, ScoreRequest

if TYPE_CHECKING:
    from conftest import Caller


def test_rerank_sends_only_given_fields(caller: Caller) -> None:
    ranking = caller.client().ranking
    answer = caller.run(ranking.rerank("q", ["a", {"text": "b"}], top_n=1, pooling="mean"))
    assert answer.results == [RerankResult(index=1, relevance_score=0.5, document=DocumentText(text="b"))]
    assert answer.score_type == "cosine_similarity"
    assert caller.url == "http://localhost:8000/v1/rerank"
    assert caller.body == {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "pooling": "mean"}


def test_score_takes_one_text_or_several(caller: Caller) -> None:
    answer = caller.run(caller.client().ranking.score("a", ["b", "c"], model="m"))
    assert answer.data == [ScoreData(index=0, score=0.5)]
    assert caller.url == "http://localhost:8000/v1/score"
    assert caller.body == {"text_1": "a", "text_2": ["b", "c"], "model": "m"}


def test_raw_and_streaming_responses_parse_into_the_usual_answers(caller: Caller) -> None:
    client = caller.client()
    for raw in (client.ranking.with_raw_response, client.with_raw_response.ranking):
        assert caller.run(raw.rerank("q", ["a"])).parse().id == "rerank-1"
    for streamed in (client.ranking.with_streaming_response, client.with_streaming_response.ranking):
        assert caller.enter(streamed.score("a", "b"), lambda response: response.parse()).id == "score-1"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text_1": "a"},
        {"text_1": "a", "queries": "a", "text_2": "b"},
        {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
        {"text_1": ["a", "b"], "text_2": "c"},
        {"text_1": "", "text_2": "b"},
        {"text_1": "a", "text_2": ["b"] * 2048},
    ],
    ids=["nothing", "one side", "two names", "no pairs", "several with one", "empty", "too many"],
)
def test_texts_that_cannot_be_paired_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(fields)


def test_wrong_fields_are_found_before_anything_is_sent(caller: Caller) -> None:
    ranking = caller.client().ranking
    for query, documents in (("", ["a"]), ("q", []), ("q", [{"title": "b"}])):
        with pytest.raises(ValidationError):
            caller.run(ranking.rerank(query, documents))
    assert not caller.requests


def test_another_servers_answer_is_told_apart(caller: Caller) -> None:
    caller.answer = lambda request: httpx2.Response(200, json={"results": []})
    with pytest.raises(InvalidAnswerError, match="RerankResponse"):
        caller.run(caller.client().ranking.rerank("q", ["a"]))
