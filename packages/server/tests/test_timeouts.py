"""Deadlines: a request that is not done in time ends with 504, wherever it stands, and leaves nothing behind."""

import asyncio
import gc
import json
import time

import httpx2
import pytest

from octavo_server.exchange import Exchange

TEXT, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
USER = {"role": "user", "content": "hi"}
BODIES = {
    "text": (TEXT, {"prompt": "a"}),
    "two prompts": (TEXT, {"prompt": ["a", "b"]}),
    "chat": (CHAT, {"messages": [USER]}),
    "embedding": (EMBED, {"input": "a"}),
    "warm": ("/v1/cache/warm", {"prompt": "a"}),
    "message": ("/v1/messages", {"messages": [USER], "max_tokens": 5}),
}


def check_nothing_left(client, engine):
    gc.collect()
    assert engine.num_running == 0
    state = client.app.state.server
    assert (state.admission.num_requests, state.drain.num_requests) == (0, 0)


@pytest.mark.parametrize("kind", BODIES)
def test_a_request_past_its_time_is_504_and_aborted(make_client, engine, kind):
    engine.hold_after = 0
    client = make_client(engine)
    path, body = BODIES[kind]
    started = time.monotonic()
    response = client.post(path, json=body, headers={"x-request-timeout": "0.05"})
    assert 0.05 <= time.monotonic() - started < 2
    assert response.status_code == 504
    error = response.json()["error"]
    assert error["type"] == "timeout_error"
    assert "within 0.05 seconds" in error["message"]
    if kind != "message":
        assert error["code"] == "timeout"
    assert response.headers["x-should-retry"] == "false"
    assert "x-request-id" in response.headers
    assert len(engine.aborted) == (2 if kind == "two prompts" else 1)
    check_nothing_left(client, engine)
    figures = client.get("/metrics").text
    assert 'status="504"} 1.0' in figures
    assert "octavo_requests_aborted_total 0.0" in figures
    engine.hold_after = None
    assert client.post(path, json=body, headers={"x-request-timeout": "60"}).status_code == 200


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_stream_past_its_time_ends_with_an_error_event(make_client, engine, path):
    engine.hold_after = 0
    client = make_client(engine)
    body = {"prompt": "a", "messages": [USER], "stream": True, "timeout": 0.05}
    response = client.post(path, json=body)
    assert response.status_code == 200
    assert json.loads(response.text.removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(engine.aborted) == 1
    check_nothing_left(client, engine)
    assert 'octavo_requests_cut_off_total{reason="timeout"} 1.0' in client.get("/metrics").text


def test_anthropics_stream_ends_with_its_own_error(make_client, engine):
    engine.hold_after = 1
    body = {"messages": [USER], "max_tokens": 5, "stream": True}
    response = make_client(engine).post("/v1/messages", json=body, headers={"x-request-timeout": "0.05"})
    last = response.text.rstrip("\n").split("\n\n")[-1]
    assert last.startswith("event: error\n")
    assert '"timeout_error"' in last


def test_the_servers_own_limit_holds_and_a_request_can_only_shorten_it(make_client, engine):
    engine.hold_after = 0
    client = make_client(engine, request_timeout=0.05)
    longer = {"prompt": "a", "timeout": 60}
    response = client.post(TEXT, json=longer, headers={"x-request-timeout": "60"})
    assert response.status_code == 504
    assert "within 0.05 seconds" in response.json()["error"]["message"]


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", "", "1e999"])
def test_a_wrong_time_in_the_header_is_400(client, engine, given):
    response = client.post(TEXT, json={"prompt": "a"}, headers={"x-request-timeout": given})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Request-Timeout"
    assert engine.requests == []


@pytest.mark.parametrize("given", [0, -1, "1", True])
def test_a_wrong_time_in_the_body_is_400(client, engine, given):
    response = client.post(TEXT, json={"prompt": "a", "timeout": given})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timeout"
    assert engine.requests == []


def test_a_late_request_does_not_harm_another(serve, engine):
    url = serve(engine)

    async def run():
        engine.hold_after = 3
        async with httpx2.AsyncClient(base_url=url) as client:
            late = asyncio.create_task(client.post(TEXT, json={"prompt": "a", "timeout": 0.2}))
            while not engine.holding.is_set():
                await asyncio.sleep(0.005)
            engine.hold_after = None
            answers = await asyncio.gather(*(client.post(TEXT, json={"prompt": "b"}) for _ in range(10)))
            return (await late).status_code, [answer.status_code for answer in answers]

    assert asyncio.run(run()) == (504, [200] * 10)


def test_the_earliest_deadline_wins_and_an_answer_in_time_cancels_it():
    async def run():
        async def serve():
            exchange = Exchange("id", asyncio.current_task())
            exchange.limit_time(5)
            exchange.limit_time(0.05)
            exchange.limit_time(9)
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                return exchange.ended_by.message

        async def answer():
            exchange = Exchange("id", asyncio.current_task())
            exchange.limit_time(0.01)
            exchange.close()
            await asyncio.sleep(0.03)
            return exchange.ended_by

        return await asyncio.create_task(serve()), await asyncio.create_task(answer())

    message, unended = asyncio.run(run())
    assert "within 0.05 seconds" in message
    assert unended is None
