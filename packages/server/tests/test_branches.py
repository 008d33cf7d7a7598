"""Forks over HTTP, on the real scheduler and a fake model."""

import asyncio
import threading
from contextlib import aclosing

import pytest
from starlette.testclient import TestClient

from octavo_engine import Branch
from octavo_engine.async_engine import AsyncEngine
from octavo_engine.engine import Engine
from octavo_engine.errors import EngineDead, InvalidRequest
from octavo_engine.executor.fake import FakeExecutor, hashed_next_token
from octavo_engine.scheduler import Scheduler
from octavo_engine.types import SamplingParams
from octavo_kvcache import CacheManager
from octavo_server import create_app

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
NEXT_TOKEN = hashed_next_token(120)  # ids below 128: one byte, one character


@pytest.fixture
def running(engine):
    cache = CacheManager(100, 4, prefix_cache=False)
    scheduler = Scheduler(cache, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=200)
    executor = FakeExecutor(4, NEXT_TOKEN)
    running = AsyncEngine(Engine(scheduler, executor), engine.text, engine.info)
    yield running
    running.close()


@pytest.fixture
def real(running):
    with TestClient(create_app(running)) as client:
        yield client


def alone(tokens: bytes, count: int, index: int = 0) -> str:
    ids = list(tokens)
    for _ in range(count):
        ids.append(NEXT_TOKEN(ids, index))
    return bytes(ids[len(tokens) :]).decode()


def complete(client, **body):
    response = client.post(TEXT, json={"max_tokens": 6, "ignore_eos": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("at", [0, 3, 6, None])
def test_a_completion_goes_on_from_a_token_of_a_kept_one(real, at):
    parent = complete(real, prompt="a prompt of some blocks", keep=True)
    text = parent["choices"][0]["text"]
    child = complete(real, parent_id=parent["id"], branch_at=at, max_tokens=5)
    begins = ("a prompt of some blocks" + text[:at]).encode()
    assert child["choices"][0]["text"] == alone(begins, 5)
    assert child["usage"]["prompt_tokens"] == len(begins)
    assert child["usage"]["prompt_tokens_details"]["cached_tokens"] == len(begins) - 1


def test_a_prompt_follows_the_parents_tokens_and_choices_have_their_own(real):
    parent = complete(real, prompt="abc", n=2, temperature=1, keep=True)
    text = parent["choices"][1]["text"]
    child = complete(real, parent_id=parent["id"], parent_index=1, branch_at=2, prompt=" then", n=2)
    begins = ("abc" + text[:2] + " then").encode()
    assert [choice["text"] for choice in child["choices"]] == [alone(begins, 6, i) for i in range(2)]


def test_a_chat_can_be_a_parent(real):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "keep": True}
    chat = real.post(CHAT, json=body).json()
    child = complete(real, parent_id=chat["id"], branch_at=4)
    assert child["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"] + 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"parent_id": "cmpl-never"}, "parent_id"),
        ({"parent_index": 1}, "parent_id"),
        ({"branch_at": 7}, "branch_at"),
        ({"cache_salt": "other"}, "parent_id"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 500}, "prompt"),
    ],
    ids=str,
)
def test_wrong_branches_are_400(real, fields, param):
    parent = complete(real, prompt="abc", keep=True)
    response = real.post(TEXT, json={"parent_id": parent["id"], **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_parents_fields_without_a_parent_and_in_chats_are_400(real):
    assert real.post(TEXT, json={"prompt": "a", "branch_at": 1}).json()["error"]["param"] == "branch_at"
    body = {"messages": [{"role": "user", "content": "hi"}], "parent_id": "cmpl-1"}
    assert real.post(CHAT, json=body).json()["error"]["param"] == "parent_id"
    body = {"prompt": "a", "keep": True, "use_beam_search": True, "n": 2}
    assert real.post(TEXT, json=body).json()["error"]["param"] == "keep"


def test_a_running_request_is_forked_in_an_asyncio_program(running, monkeypatch):
    step = running._engine.step
    monkeypatch.setattr(running._engine, "step", lambda: threading.Event().wait(0.002) or step())

    async def main() -> None:
        text = running.text
        # Kept, for on a busy machine it may have ended before it is forked.
        request = text.make_request(
            text.encode_prompt("abcde"), SamplingParams(max_tokens=150), request_id="p", keep=True
        )
        async with aclosing(running.generate(request)) as deltas:
            await anext(deltas)
            child = await running.fork(
                Branch("p", branch_at=1, continuation="xyz"), SamplingParams(max_tokens=5), request_id="c"
            )
            got = [delta.text async for batch in running.generate(child) for delta in batch]
        begins = b"abcde" + alone(b"abcde", 1).encode() + b"xyz"
        assert "".join(got) == alone(begins, 5)
        with pytest.raises(InvalidRequest):
            await running.fork(Branch("never"), SamplingParams(), request_id="d")

    asyncio.run(main())


def test_release_frees_what_was_kept(running):
    async def main() -> None:
        text = running.text
        request = text.make_request([1] * 9, SamplingParams(max_tokens=5), request_id="p", keep=True)
        async for _ in running.generate(request):
            pass
        assert running.stats().cache.num_used > 0
        assert await running.release("p")
        assert running.stats().cache.num_used == 0
        assert not await running.release("p")

    asyncio.run(main())


def test_an_answer_is_released_by_its_id(real, running):
    parent = complete(real, prompt="a prompt of some blocks", n=2, temperature=1, keep=True)
    path = f"/v1/requests/{parent['id']}"
    assert running.stats().cache.num_used > 0
    released = real.delete(path)
    assert released.status_code == 200
    assert released.json() == {"id": parent["id"], "object": "request.released", "released": True}
    assert running.stats().cache.num_used == 0
    for unknown in (path, "/v1/requests/never", "/v1/requests/%00%F0%9F%98%80"):
        response = real.delete(unknown)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "request_not_found"
    assert real.post(TEXT, json={"parent_id": parent["id"]}).json()["error"]["code"] == "parent_not_found"


def test_each_prompts_answer_is_released_by_itself(real, running):
    parent = complete(real, prompt=["abc", "defg"], keep=True)
    for place in range(2):
        assert running.stats().cache.num_used > 0
        assert real.delete(f"/v1/requests/{parent['id']}-{place}").status_code == 200
    assert running.stats().cache.num_used == 0


def test_an_engine_that_has_stopped_answers_no_branch(running):
    running.close()
    with pytest.raises(EngineDead):
        asyncio.run(running.branch_tokens(Branch("p")))
    with pytest.raises(EngineDead):
        asyncio.run(running.release("p"))
