"""Limits of keys: what is let in, what the others are told, and that a minute gives back what it took."""

import httpx2
import pytest
from openai import OpenAI, RateLimitError

from octavo_server.errors import ApiError
from octavo_server.keys import ApiKey
from octavo_server.rate_limits import KeyBudget

TEXT, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
ALICE, BOB = {"authorization": "Bearer sk-alice"}, {"x-api-key": "sk-bob"}


def key(name, **limits):
    return ApiKey.of(name, f"sk-{name}", **limits)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def budget(clock, told=None, **limits):
    return KeyBudget(key("alice", **limits), (told if told is not None else []).append, clock)


def refusal(act):
    with pytest.raises(ApiError) as caught:
        act()
    assert caught.value.status == 429
    assert caught.value.code == "rate_limit_exceeded"
    return caught.value


def test_a_minute_gives_back_as_many_requests_as_it_may_have():
    clock, told = Clock(), []
    alice = budget(clock, told, requests_per_minute=3)
    for _ in range(3):
        alice.enter()
    refused = refusal(alice.enter)
    assert (refused.type, refused.headers["retry-after"], refused.headers["retry-after-ms"]) == (
        "requests",
        "20",
        "20000",
    )
    assert told == ["requests_per_minute"]
    clock.now += 19.99
    assert refusal(alice.enter).headers["retry-after"] == "1"
    clock.now += 0.02
    alice.enter()
    clock.now += 1000  # no more than a minute's worth is saved
    for _ in range(3):
        alice.enter()
    refusal(alice.enter)


def test_tokens_that_nobody_foresaw_are_a_debt():
    clock = Clock()
    alice = budget(clock, tokens_per_minute=60)
    alice.enter()
    alice.take_prompts(40)
    alice.take_tokens(50)
    refused = refusal(alice.enter)
    assert (refused.type, refused.headers["retry-after"]) == ("tokens", "31")
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 31.5
    alice.enter()
    assert refusal(lambda: alice.take_prompts(10)).headers["retry-after"] == "9"


def test_a_prompt_over_the_whole_limit_is_taken_when_nothing_was_used():
    clock = Clock()
    alice = budget(clock, tokens_per_minute=60)
    alice.take_prompts(200)
    assert refusal(lambda: alice.take_prompts(200)).headers["retry-after"] == "200"
    clock.now += 200
    alice.take_prompts(200)


def test_requests_in_progress_are_counted():
    alice = budget(Clock(), max_concurrent_requests=2)
    alice.enter()
    alice.enter()
    refusal(alice.enter)
    alice.leave()
    alice.enter()
    assert alice.headers() == {}


def test_what_is_left_is_in_the_form_that_openais_clients_know():
    clock = Clock()
    alice = budget(clock, requests_per_minute=60, tokens_per_minute=600)
    alice.enter()
    alice.take_prompts(100)
    assert alice.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10.000s",
    }


def test_a_flood_of_one_key_is_429_and_another_key_is_served(make_client, engine):
    client = make_client(engine, named_keys=(key("alice", requests_per_minute=2), key("bob")))
    answers = [client.post(TEXT, json={"prompt": "a"}, headers=ALICE) for _ in range(20)]
    assert [answer.status_code for answer in answers] == [200] * 2 + [429] * 18
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:3]] == ["1", "0", "0"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert "'alice' may make 2 requests a minute" in answers[-1].json()["error"]["message"]
    assert "x-request-id" in answers[-1].headers
    assert client.post(TEXT, json={"prompt": "a"}, headers=BOB).status_code == 200
    assert client.get("/v1/models", headers=ALICE).status_code == 200  # reading costs nothing
    assert len(engine.requests) == 3
    figures = client.get("/metrics").text
    assert 'octavo_rate_limited_total{key="alice",limit="requests_per_minute"} 18.0' in figures
    assert 'octavo_admission_rejections_total{reason="rate_limited"} 18.0' in figures
    assert 'octavo_key_tokens_total{key="alice",kind="generation"} 16.0' in figures


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "x" * 30}),
        (TEXT, {"prompt": "x" * 30, "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 20}]}),
        (EMBED, {"input": "x" * 30}),
        ("/v1/cache/warm", {"prompt": "x" * 30}),
        ("/v1/cache/pins", {"prompt": "x" * 30}),
    ],
    ids=["text", "stream", "chat", "embedding", "warm", "pin"],
)
def test_tokens_over_the_limit_are_plain_429_before_the_engine_sees_them(make_client, engine, path, body):
    client = make_client(engine, named_keys=(key("alice", tokens_per_minute=50),))
    first = client.post(path, json=body, headers=ALICE)
    assert first.status_code == 200
    second = client.post(path, json=body, headers=ALICE)
    assert second.status_code == 429
    assert second.headers["content-type"] == "application/json"
    assert second.json()["error"]["type"] == "tokens"
    assert len(engine.requests) == 1
    assert client.app.state.server.admission.num_requests == 0


def test_generated_tokens_count(make_client, engine):
    engine.replies = ["x" * 60]
    client = make_client(engine, named_keys=(key("alice", tokens_per_minute=50),))
    stream = client.post(TEXT, json={"prompt": "a", "stream": True, "max_tokens": 60}, headers=ALICE)
    assert stream.status_code == 200
    assert client.post(TEXT, json={"prompt": "a"}, headers=ALICE).status_code == 429


def test_a_place_is_free_again_when_the_client_has_left(serve, engine, wait_until):
    engine.hold_after = 1
    url = serve(engine, named_keys=(key("alice", max_concurrent_requests=1),))
    with httpx2.stream("POST", f"{url}{TEXT}", json={"prompt": "a", "stream": True}, headers=ALICE) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert httpx2.post(f"{url}{TEXT}", json={"prompt": "a"}, headers=ALICE).status_code == 429
    wait_until(lambda: engine.num_running == 0)
    engine.hold_after = None
    wait_until(lambda: httpx2.post(f"{url}{TEXT}", json={"prompt": "a"}, headers=ALICE).status_code == 200)


def test_openais_client_knows_the_limit_and_waits_as_long_as_it_is_told(serve, engine):
    url = serve(engine, named_keys=(key("alice", requests_per_minute=1),))
    with OpenAI(base_url=f"{url}/v1", api_key="sk-alice", max_retries=0) as client:
        client.completions.create(model="org/fake-model", prompt="a")
        with pytest.raises(RateLimitError) as caught:
            client.completions.create(model="org/fake-model", prompt="a")
    assert 0 < float(caught.value.response.headers["retry-after-ms"]) <= 60_000
