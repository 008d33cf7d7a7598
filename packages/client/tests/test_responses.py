from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest

from octavo_client import InvalidAnswerError
from octavo_client.resources import _waiting

if TYPE_CHECKING:
    from conftest import Caller

RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Paris.", "annotations": []}],
        }
    ],
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr("octavo_client.resources.responses.FIRST_PAUSE", 0.001)


def events(first: int, last: int, *, ends: bool) -> bytes:
    kinds = ["response.in_progress"] * (last - first + 1)
    if ends:
        kinds[-1] = "response.completed"
    told = [{"type": kind, "sequence_number": first + place, "response": RESPONSE} for place, kind in enumerate(kinds)]
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in told).encode()


class Server:
    """Answers with one stream after the other; an exception in its place, or within it, breaks the connection."""

    def __init__(self, *streams: bytes | Exception) -> None:
        self.streams = list(streams)
        self.starts: list[str | None] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.starts.append(request.url.params.get("starting_after"))
        stream = self.streams.pop(0)
        if isinstance(stream, Exception):
            raise stream
        return httpx2.Response(200, content=stream, headers={"content-type": "text/event-stream"})


def numbers(caller: Caller, client: Any, **options: Any) -> list[int]:
    async def collect() -> list[int]:
        return [event.sequence_number async for event in client.responses.follow("resp_1", **options)]

    if caller.kind == "async":
        result: list[int] = caller.run(collect())
        return result
    return [event.sequence_number for event in client.responses.follow("resp_1", **options)]


def test_wait_polls_until_the_end(caller: Caller) -> None:
    states = iter(["queued", "in_progress", "completed"])
    caller.answer = lambda request: httpx2.Response(200, json=RESPONSE | {"status": next(states)})
    response = caller.run(caller.client().responses.wait("resp_1", timeout=5))
    assert (response.output_text, len(caller.requests)) == ("Paris.", 3)
    caller.answer = lambda request: httpx2.Response(200, json=RESPONSE | {"status": "queued"})
    with pytest.raises(TimeoutError, match=r"response resp_1 has not ended within 0.01 seconds"):
        caller.run(caller.client().responses.wait("resp_1", timeout=0.01))


def test_follow_takes_a_broken_stream_up_behind_the_last_event(caller: Caller) -> None:
    server = Server(
        events(0, 2, ends=False),
        httpx2.ReadError("broken"),
        events(3, 3, ends=False),
        httpx2.ConnectError("away"),
        events(4, 5, ends=True),
    )
    caller.answer = server
    assert numbers(caller, caller.client(max_retries=1)) == [0, 1, 2, 3, 4, 5]
    assert server.starts == [None, "2", "2", "3", "3"]
    caller.answer = server = Server(events(5, 5, ends=True))
    assert numbers(caller, caller.client(), starting_after=4) == [5]
    assert server.starts == ["4"]


def test_follow_gives_up_when_nothing_comes(caller: Caller) -> None:
    caller.answer = Server(*[httpx2.ConnectError("away") for _ in range(4)])
    with pytest.raises(openai.APIConnectionError):
        numbers(caller, caller.client(max_retries=1))
    caller.answer = Server(b"", b"")
    with pytest.raises(InvalidAnswerError, match="ended before"):
        numbers(caller, caller.client(max_retries=1))
    error = {"error": {"message": "no response", "type": "x", "param": "id", "code": "response_not_found"}}
    caller.answer = lambda request: httpx2.Response(404, json=error)
    with pytest.raises(openai.NotFoundError):
        numbers(caller, caller.client())


def test_the_sdks_methods_are_there(caller: Caller) -> None:
    caller.answer = lambda request: httpx2.Response(200, json=RESPONSE)
    client = caller.client()
    assert caller.run(client.responses.create(model="m", input="hi")).output_text == "Paris."
    assert caller.run(client.responses.with_raw_response.retrieve("resp_1")).parse().output_text == "Paris."
    assert caller.run(client.with_raw_response.responses.retrieve("resp_1")).parse().output_text == "Paris."
