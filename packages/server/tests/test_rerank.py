"""Rerank and score, on embeddings that a test writes: the cosine of an angle between texts and the query."""

import math

import pytest

from octavo_engine.types import EmbeddingOutput

ANGLES = {"query": 0, "near": 10, "far": 120, "same": 0, "opposite": 180}
DOCUMENTS = ["far", "near", "opposite", "same"]


@pytest.fixture
def angles(engine, monkeypatch):
    """Embed a text as a vector in the direction that ANGLES says."""

    async def embed(request):
        engine.check_ready()
        engine.requests.append(request)
        angle = math.radians(ANGLES[bytes(request.prompt_token_ids).decode()])
        return EmbeddingOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            embedding=[math.cos(angle), math.sin(angle)],
        )

    monkeypatch.setattr(engine, "embed", embed)


def error_of(response):
    return response.json()["error"]


@pytest.mark.usefixtures("angles")
@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_come_best_first_with_their_places(client, engine, path):
    answer = client.post(path, json={"model": "org/fake-model", "query": "query", "documents": DOCUMENTS}).json()
    assert answer["id"].startswith("rerank-")
    assert (answer["model"], answer["score_type"]) == ("org/fake-model", "cosine_similarity")
    assert answer["usage"] == {"prompt_tokens": 24, "total_tokens": 24}
    assert [(r["index"], r["document"]["text"]) for r in answer["results"]] == [
        (3, "same"),
        (1, "near"),
        (0, "far"),
        (2, "opposite"),
    ]
    expected = [math.cos(math.radians(angle)) for angle in (0, 10, 120, 180)]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx(expected)
    assert {(request.task, request.pooling) for request in engine.requests} == {("embed", "last")}


@pytest.mark.usefixtures("angles")
def test_the_best_alone_and_no_documents_where_they_are_not_wanted(client):
    body = {"query": "query", "documents": [{"text": "far"}, {"text": "near"}], "top_n": 1, "return_documents": False}
    (result,) = client.post("/v1/rerank", json=body).json()["results"]
    assert result.keys() == {"index", "relevance_score"}
    assert result["index"] == 1
    assert len(client.post("/v1/rerank", json=body | {"top_n": 0}).json()["results"]) == 2


@pytest.mark.usefixtures("angles")
def test_equal_texts_are_embedded_once_and_keep_their_order(client, engine):
    body = {"query": "near", "documents": ["near", "far", "near"], "pooling": "mean", "cache_salt": "a", "priority": -1}
    answer = client.post("/v1/rerank", json=body).json()
    assert [r["index"] for r in answer["results"]] == [0, 2, 1]
    assert len(engine.requests) == 2
    assert {(r.pooling, r.salt, r.priority) for r in engine.requests} == {("mean", b"a", -1)}


@pytest.mark.usefixtures("angles")
@pytest.mark.parametrize(
    ("body", "scores"),
    [
        ({"text_1": "query", "text_2": "far"}, [-0.5]),
        ({"text_1": "query", "text_2": ["same", "far"]}, [1, -0.5]),
        ({"text_1": ["query", "far"], "text_2": ["far", "far"]}, [-0.5, 1]),
        ({"queries": ["query"], "documents": ["opposite", "same"]}, [-1, 1]),
    ],
    ids=["one with one", "one with several", "pairs", "vLLM's new names"],
)
def test_scores_of_pairs(client, body, scores):
    answer = client.post("/score", json=body).json()
    assert (answer["object"], answer["score_type"]) == ("list", "cosine_similarity")
    assert [(d["index"], d["object"]) for d in answer["data"]] == [(i, "score") for i in range(len(scores))]
    assert [d["score"] for d in answer["data"]] == pytest.approx(scores)
    assert answer["usage"]["completion_tokens"] == 0
    assert client.post("/v1/score", json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/rerank", {"documents": ["a"]}, 400, "query"),
        ("/rerank", {"query": "", "documents": ["a"]}, 400, "query"),
        ("/rerank", {"query": "a", "documents": []}, 400, "documents"),
        ("/rerank", {"query": "a", "documents": "b"}, 400, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"] * 2048}, 400, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "model": "other"}, 404, "model"),
        ("/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["title"]}, 400, "rank_fields"),
        ("/rerank", {"query": "a", "documents": ["b" * 300]}, 400, None),
        ("/score", {"text_1": "a"}, 400, None),
        ("/score", {"text_1": "a", "queries": "a", "text_2": "b"}, 400, None),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, None),
        ("/score", {"text_1": ["a", ""], "text_2": ["a", "b"]}, 400, None),
        ("/score", {"text_1": [], "text_2": []}, 400, None),
    ],
)
def test_wrong_bodies_are_refused(client, engine, path, body, status, param):
    response = client.post(path, json=body)
    assert (response.status_code, engine.requests) == (status, []), response.text
    if param is not None:
        assert error_of(response)["param"].startswith(param)


def test_long_texts_can_be_cut(client, engine):
    body = {"query": "a", "documents": ["b" * 300], "truncate_prompt_tokens": 20}
    assert client.post("/rerank", json=body).status_code == 200
    assert [len(request.prompt_token_ids) for request in engine.requests] == [1, 20]


def test_a_sleeping_engine_says_so(client, engine):
    engine.sleep_level = 1
    assert client.post("/rerank", json={"query": "a", "documents": ["b"]}).status_code == 503
