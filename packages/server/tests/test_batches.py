"""Batches: from a file of requests to a file of answers; wrong lines, cancelling, the window, and who goes first."""

import asyncio
import json
import threading
import time

import openai
import pytest
from openai.types import Batch

from octavo_server import batch_runner
from octavo_server.batch_runner import PRIORITY
from octavo_server.store.database import StoreFailed

BATCHES, FILES = "/v1/batches", "/v1/files"
CHAT = "/v1/chat/completions"


def line(custom_id, url=CHAT, **body):
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines):
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def create(client, *lines, endpoint=CHAT, window="24h", **body):
    upload = {"file": ("in.jsonl", jsonl(*lines))}
    file = client.post(FILES, files=upload, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": window, **body}
    response = client.post(BATCHES, json=body)
    assert response.status_code == 200, response.text
    Batch.model_validate(response.json())
    return response.json()


def ended(client, batch, timeout=5):
    deadline = time.monotonic() + timeout
    while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        batch = client.get(f"{BATCHES}/{batch['id']}").json()
    Batch.model_validate(batch)
    return batch


def content(client, file_id):
    if file_id is None:
        return {}
    lines = [json.loads(one) for one in client.get(f"{FILES}/{file_id}/content").text.splitlines()]
    assert all(one["id"].startswith("batch_req_") for one in lines)
    return {one["custom_id"]: one for one in lines}


def test_each_line_is_answered_in_one_of_two_files(client, engine):
    lines = [line("a"), line("b", temperature=9), line("c", stream=True), line("d", model="other"), b"  ", line("e")]
    batch = create(client, *lines, metadata={"night": "1"})
    assert (batch["status"], batch["request_counts"]) == ("validating", {"total": 0, "completed": 0, "failed": 0})
    batch = ended(client, batch)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    assert batch["metadata"] == {"night": "1"}
    assert batch["usage"]["output_tokens"] == 16
    assert batch["created_at"] <= batch["in_progress_at"] <= batch["finalizing_at"] <= batch["completed_at"]
    assert batch["expires_at"] == batch["created_at"] + 24 * 3600
    output, errors = content(client, batch["output_file_id"]), content(client, batch["error_file_id"])
    assert list(output) == ["a", "e"]
    response = output["a"]["response"]
    assert (response["status_code"], output["a"]["error"]) == (200, None)
    assert response["body"]["choices"][0]["message"]["content"] == " Paris."
    assert {name: one["response"]["status_code"] for name, one in errors.items()} == {"b": 400, "c": 400, "d": 404}
    assert errors["b"]["response"]["body"]["error"]["param"] == "temperature"
    file = client.get(f"{FILES}/{batch['output_file_id']}").json()
    assert (file["purpose"], file["expires_at"]) == ("batch_output", file["created_at"] + 30 * 24 * 3600)
    assert all(request.priority == PRIORITY for request in engine.requests)
    exposed = client.get("/metrics").text
    for figure in (
        'batch_lines_total{outcome="completed"} 2',
        'batch_lines_total{outcome="failed"} 3',
        "batches_open 0",
    ):
        assert f"octavo_{figure}" in exposed


BODIES = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize("endpoint", BODIES)
def test_every_endpoint_is_served(client, endpoint):
    one = {"custom_id": "a", "method": "POST", "url": endpoint, "body": BODIES[endpoint]}
    batch = ended(client, create(client, one, endpoint=endpoint))
    body = content(client, batch["output_file_id"])["a"]["response"]["body"]
    assert body["object"] in ("text_completion", "list", "response")
    assert batch["usage"]["total_tokens"] == body["usage"]["total_tokens"]


def test_wrong_lines_fail_a_batch_and_each_is_told(client, engine):
    wrong = [
        line("a"),
        b"{broken",
        b"[1]",
        line(""),
        line("a"),
        line("b", url="/v1/embeddings"),
        {**line("c"), "method": "GET"},
        {**line("d"), "body": "x"},
        b'{"custom_id": "\\ud800"}',
        b"[" * 5000,
    ]
    batch = ended(client, create(client, *wrong))
    assert batch["status"] == "failed"
    told = [(error["line"], error["code"]) for error in batch["errors"]["data"]]
    assert told == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
        (4, "invalid_custom_id"),
        (5, "duplicate_custom_id"),
        (6, "mismatched_url"),
        (7, "invalid_method"),
        (8, "invalid_body"),
        (9, "invalid_custom_id"),
        (10, "invalid_json_line"),
    ]
    assert engine.requests == []
    assert ended(client, create(client))["errors"]["data"][0]["code"] == "empty_file"


def test_lines_have_a_limit(make_client, engine):
    client = make_client(engine, max_body_bytes=500)
    batch = ended(client, create(client, line("a"), line("b", user="x" * 500)))
    assert [(error["line"], error["code"]) for error in batch["errors"]["data"]] == [(2, "line_too_long")]


REFUSED = {
    "an unknown file": ({"input_file_id": "file-1"}, "input_file_id"),
    "an unknown endpoint": ({"endpoint": "/v1/models"}, "endpoint"),
    "no window": ({"completion_window": "soon"}, "completion_window"),
    "wrong metadata": ({"metadata": {"a": 1}}, "metadata.a"),
    "a wrong end": ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_is_one_error(client, body, param):
    file = client.post(FILES, files={"file": ("a", b"x")}, data={"purpose": "batch"}).json()
    given = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    response = client.post(BATCHES, json=given | body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    other = client.post(FILES, files={"file": ("a", b"x")}, data={"purpose": "user_data"}).json()
    assert client.post(BATCHES, json=given | {"input_file_id": other["id"]}).status_code == 400
    assert client.get(f"{BATCHES}/batch_1").status_code == 404


def test_no_more_lines_run_than_there_are_slots_and_clients_are_served_meanwhile(make_client, engine, wait_until):
    client = make_client(engine, max_num_background=3)
    engine.hold_after = 2
    batch = create(client, *(line(f"{i}") for i in range(10)))
    wait_until(lambda: engine.num_generation_tokens == 6)  # all three are held
    engine.hold_after = None
    assert client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]}).status_code == 200
    assert engine.requests[-1].priority == 0
    assert engine.num_running == 3
    reader = client.delete(f"{FILES}/{batch['input_file_id']}")
    assert (reader.status_code, reader.json()["error"]["code"]) == (400, "file_in_use")
    cancelling = client.post(f"{BATCHES}/{batch['id']}/cancel").json()
    assert cancelling["status"] == "cancelling"
    assert (engine.num_running, len(engine.aborted)) == (0, 3)
    batch = ended(client, cancelling)
    assert (batch["status"], batch["output_file_id"]) == ("cancelled", None)
    assert batch["cancelling_at"] <= batch["cancelled_at"]
    errors = content(client, batch["error_file_id"])
    assert [one["error"]["code"] for one in errors.values()] == ["batch_cancelled"] * 10
    assert client.post(f"{BATCHES}/{batch['id']}/cancel").json() == batch
    assert client.delete(f"{FILES}/{batch['input_file_id']}").status_code == 200


def test_what_is_not_done_in_the_window_is_given_up(make_client, engine):
    client = make_client(engine, max_num_background=1)
    engine.hold_after = 5
    batch = ended(client, create(client, line("a", max_tokens=3), line("b"), window="2s"))
    assert batch["status"] == "expired"
    assert batch["expired_at"] >= batch["expires_at"]
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 0}
    assert list(content(client, batch["output_file_id"])) == ["a"]
    assert content(client, batch["error_file_id"])["b"]["error"]["code"] == "batch_expired"
    assert engine.num_running == 0


def test_a_batch_that_stopped_is_taken_up_again(client, engine, monkeypatch, wait_until):
    monkeypatch.setattr(batch_runner, "_REST_SECONDS", 0.01)
    store = client.app.state.durable.store.batches
    finish_line, broken = store.finish_line, []

    async def finish_later(batch_id, number, **result):
        if len(broken) < 2:
            broken.append(number)
            raise StoreFailed("the disk is full")
        await finish_line(batch_id, number, **result)

    monkeypatch.setattr(store, "finish_line", finish_later)
    batch = ended(client, create(client, line("a"), line("b")))
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert broken


def test_lines_run_in_the_name_of_their_key_and_may_run_out_of_time(make_client, engine):
    client = make_client(engine, api_keys=("one", "two"))
    client.headers["authorization"] = "Bearer two"
    engine.hold_after = 5
    batch = ended(client, create(client, line("a", max_tokens=3), line("b", timeout=0.05)))
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert content(client, batch["error_file_id"])["b"]["response"]["status_code"] == 504
    assert {request.tenant.name for request in engine.requests} == {"key-2"}


def test_a_line_that_finds_no_room_is_tried_again(make_client, engine, monkeypatch):
    monkeypatch.setattr(batch_runner, "_PAUSE_SECONDS", 0.01)
    client = make_client(engine, max_num_requests=1)
    batch = ended(client, create(client, *(line(f"{i}") for i in range(5))))
    assert batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}


def test_batches_are_listed_newest_first_to_their_owner(make_client, engine):
    client = make_client(engine, api_keys=("one", "two"))
    client.headers["authorization"] = "Bearer one"
    one = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "hi"}}
    ids = [ended(client, create(client, one, endpoint="/v1/responses"))["id"] for _ in range(3)]
    page = client.get(BATCHES, params={"limit": 2}).json()
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    output = content(client, page["data"][0]["output_file_id"])["a"]["response"]["body"]
    assert client.get(f"/v1/responses/{output['id']}").json() == output
    client.headers["authorization"] = "Bearer two"
    assert client.get(BATCHES).json()["data"] == []
    assert client.get(f"{BATCHES}/{ids[0]}").status_code == 404
    assert client.get(f"/v1/responses/{output['id']}").status_code == 404


def test_the_lines_that_a_stopped_server_had_done_are_not_done_again(make_client, engine, wait_until):
    client = make_client(engine, max_num_background=2)
    durable = client.app.state.durable
    engine.hold_after, engine.replies = 5, [" yes."]
    short = [line(f"{i}", max_tokens=4) for i in range(5)]
    batch = create(client, *short, *(line(f"{i}") for i in range(5, 9)))
    wait_until(lambda: client.get(f"{BATCHES}/{batch['id']}").json()["request_counts"]["completed"] == 5)
    wait_until(lambda: engine.num_running == 2)
    client.portal.call(durable.batches.close)
    assert engine.num_running == 0
    engine.hold_after, engine.requests = None, []

    async def recover():
        durable.batches._tasks.clear()
        await durable.batches.recover()

    client.portal.call(recover)
    batch = ended(client, batch)
    assert batch["request_counts"] == {"total": 9, "completed": 9, "failed": 0}
    assert len(engine.requests) == 4
    assert sorted(content(client, batch["output_file_id"])) == [f"{i}" for i in range(9)]


def test_the_sdk_runs_a_batch(engine, serve):
    with openai.OpenAI(base_url=serve(engine) + "/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", jsonl(line("a"), line("b"))), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            metadata={"a": "b"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        while batch.status != "completed":
            batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 2
        lines = client.files.content(batch.output_file_id).text.splitlines()
        assert [json.loads(one)["custom_id"] for one in lines] == ["a", "b"]
        kept = client.files.retrieve(batch.output_file_id)
        assert kept.expires_at == kept.created_at + 3600
        assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
        assert client.batches.cancel(batch.id) == batch


def test_the_event_loop_does_not_wait_for_the_store(client):
    database, released = client.app.state.durable.store.files._database, threading.Event()

    async def release():
        slow = asyncio.create_task(database.run(lambda connection: released.wait(5)))
        await asyncio.sleep(0.01)
        released.set()
        return await slow

    assert client.portal.call(release)
