"""GET /v1/requests/{id}/timeline."""

from dataclasses import replace

from octavo_engine.timeline import ChoiceTimes, Preemption, PromptChunk, RequestTimeline, Wait, WaitReason
from octavo_engine.types import CachedTokens, FinishReason
from octavo_server.keys import ApiKey

TIMELINE = RequestTimeline(
    request_id="cmpl-1",
    state="finished",
    arrival=1_700_000_000.5,
    grammar_seconds=0.25,
    num_prompt_tokens=100,
    cached=CachedTokens(full=32, partial=3),
    num_waiting_before=2,
    waits=(Wait(0, 0.0, 1.5, {WaitReason.ROWS: 1.0, WaitReason.TOKEN_BUDGET: 0.5}),),
    chunks=(PromptChunk(0, 1.5, 0.1, 65, False),),
    preemptions=(Preemption(0, 2.0, "swap"),),
    choices=(ChoiceTimes(0, 1.625, 3.0, FinishReason.STOP, 7),),
    num_omitted=1,
)


def test_a_timeline_is_told_by_the_id_of_the_answer(client, engine):
    engine.timelines["cmpl-1"] = TIMELINE
    assert client.get("/v1/requests/cmpl-1/timeline").json() == {
        "id": "cmpl-1",
        "object": "request.timeline",
        "state": "finished",
        "arrival": 1_700_000_000.5,
        "grammar_seconds": 0.25,
        "prompt_tokens": 100,
        "cached_tokens": {"full": 32, "partial": 3, "fork": 0},
        "waiting_before": 2,
        "waits": [
            {"index": 0, "start": 0.0, "seconds": 1.5, "ended": True, "reasons": {"rows": 1.0, "token_budget": 0.5}}
        ],
        "chunks": [{"index": 0, "start": 1.5, "seconds": 0.1, "tokens": 65, "resumes": False}],
        "preemptions": [{"index": 0, "start": 2.0, "kind": "swap"}],
        "choices": [{"index": 0, "first_token": 1.625, "finished": 3.0, "finish_reason": "stop", "tokens": 7}],
        "omitted": 1,
    }


def test_an_unknown_request_is_404(client):
    response = client.get("/v1/requests/cmpl-2/timeline")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "request_not_found")


def test_a_request_of_another_key_is_the_same_404(make_client, engine):
    client = make_client(engine, named_keys=(ApiKey.of("bob", "b"), ApiKey.of("eve", "e")), admin_api_key="root")
    engine.timelines["cmpl-1"] = replace(TIMELINE, tenant="bob")

    def get(key, request_id="cmpl-1"):
        return client.get(f"/v1/requests/{request_id}/timeline", headers={"authorization": f"Bearer {key}"})

    assert [get(key).status_code for key in ("b", "root", "e", "x")] == [200, 200, 404, 401]
    foreign, unknown = get("e").json(), get("e", "cmpl-2").json()
    assert foreign["error"] == unknown["error"] | {"message": foreign["error"]["message"]}
    assert foreign["error"]["message"].replace("cmpl-1", "cmpl-2") == unknown["error"]["message"]
