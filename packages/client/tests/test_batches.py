from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from openai.types import Batch
from pydantic import ValidationError

from octavo_client import wire_batches
from octavo_client.resources import _waiting

if TYPE_CHECKING:
    from conftest import Caller

FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 1,
    "created_at": 1,
    "filename": "a",
    "purpose": "batch",
    "status": "processed",
}
BATCH = {
    "id": "batch_1",
    "object": "batch",
    "endpoint": "/v1/responses",
    "input_file_id": "file-1",
    "completion_window": "24h",
    "created_at": 1,
    "status": "completed",
    "output_file_id": "file-2",
    "error_file_id": "file-3",
}
ANSWERED = {"id": "r1", "custom_id": "fr", "response": {"status_code": 200, "request_id": "q", "body": {"a": 1}}}
REFUSED = {
    "id": "r2",
    "custom_id": "it",
    "response": {"status_code": 400, "request_id": "q", "body": {}},
    "error": None,
}
GIVEN_UP = {"id": "r3", "custom_id": "es", "response": None, "error": {"code": "batch_expired", "message": "late"}}
CONTENTS = {"file-2": [ANSWERED], "file-3": [REFUSED, GIVEN_UP]}


def answer(request: httpx2.Request) -> httpx2.Response:
    path = request.url.path
    if path.endswith("/content"):
        lines = CONTENTS[path.split("/")[-2]]
        return httpx2.Response(200, text="".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return httpx2.Response(200, json=FILE if "/files" in path else BATCH)


def collect(caller: Caller, results: Any) -> list[Any]:
    async def gather() -> list[Any]:
        return [item async for item in results]

    return caller.run(gather()) if caller.kind == "async" else list(results)  # type: ignore[no-any-return]


def test_submit_uploads_the_requests_and_begins_a_batch(caller: Caller) -> None:
    caller.answer = answer
    bodies = {"fr": {"input": "Capital of France?"}, "it": {"input": "Capital of Italy?"}}
    batch = caller.run(
        caller.client().batches.submit(
            bodies, endpoint="/v1/responses", completion_window="2h", metadata={"night": "1"}
        )
    )
    assert batch.id == "batch_1"
    upload, create = caller.requests
    assert b'name="purpose"\r\n\r\nbatch\r\n' in upload.content
    lines = [json.loads(line) for line in upload.content.splitlines() if line.startswith(b"{")]
    assert lines == [
        {"custom_id": name, "method": "POST", "url": "/v1/responses", "body": body} for name, body in bodies.items()
    ]
    assert json.loads(create.content) == {
        "input_file_id": "file-1",
        "endpoint": "/v1/responses",
        "completion_window": "2h",
        "metadata": {"night": "1"},
    }


def test_what_cannot_be_sent_is_refused_before_sending(caller: Caller) -> None:
    for bodies in ({"": {}}, {"a": {"b": object()}}):
        with pytest.raises(ValidationError):
            caller.run(caller.client().batches.submit(bodies))
    assert caller.requests == []


def test_wait_polls_until_the_end(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "FIRST_PAUSE", 0.001)
    states = iter(["validating", "in_progress", "finalizing", "expired"])
    caller.answer = lambda request: httpx2.Response(200, json=BATCH | {"status": next(states)})
    assert caller.run(caller.client().batches.wait("batch_1")).status == "expired"
    caller.answer = lambda request: httpx2.Response(200, json=BATCH | {"status": "validating"})
    with pytest.raises(TimeoutError, match="batch batch_1"):
        caller.run(caller.client().batches.wait("batch_1", timeout=0.01))


def test_results_are_typed(caller: Caller) -> None:
    caller.answer = answer
    results = collect(caller, caller.client().batches.results(Batch.model_validate(BATCH)))
    assert [(result.custom_id, result.succeeded) for result in results] == [("fr", True), ("it", False), ("es", False)]
    assert results[0].response.body == {"a": 1}
    assert results[2].error.code == "batch_expired"
    none = Batch.model_validate(BATCH | {"output_file_id": None, "error_file_id": None})
    assert collect(caller, caller.client().batches.results(none)) == []


def test_files_of_lines(caller: Caller) -> None:
    caller.answer = answer
    client = caller.client()
    assert caller.run(client.files.create_lines([{"a": "é"}], purpose="user_data", filename="n.jsonl")).id == "file-1"
    assert b'filename="n.jsonl"' in caller.requests[-1].content
    assert b'{"a": "\\u00e9"}\n' in caller.requests[-1].content
    assert collect(caller, client.files.lines("file-2")) == [ANSWERED]


def test_every_field_is_described() -> None:
    for name in wire_batches.__all__:
        for field, info in getattr(getattr(wire_batches, name), "model_fields", {}).items():
            assert info.description or field == "method", f"{name}.{field}"
