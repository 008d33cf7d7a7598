"""A server in memory, and one way to call the sync and the async client alike."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from typing import Any

import httpx2
import openai
import pytest

from octavo_client import AsyncOctavo, Octavo

CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Paris."}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}
CHAT_CHUNKS = [
    {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
    }
    for delta, reason in [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Par"}, None),
        ({"content": "is."}, "stop"),
    ]
]
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "text": " Paris.", "finish_reason": "stop", "logprobs": None}],
}
EMBEDDING = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}],
    "usage": {"prompt_tokens": 1, "total_tokens": 1},
}
TOKENS = {"count": 2, "max_model_len": 2048, "tokens": [504, 3575], "token_strs": None}
ROOT = {
    "/tokenize": TOKENS,
    "/detokenize": {"prompt": "The capital"},
    "/health": {"status": "ok"},
    "/ready": {"status": "ready", "models": ["m"]},
    "/version": {"version": "0.1.0", "packages": {"octavo-engine": "0.1.0"}},
}


MEMORY = {
    "object": "engine.memory",
    "sleep_level": 1,
    "weights_digest": "ab",
    "bytes_before": 1000,
    "bytes_after": 400,
    "freed_bytes": 600,
    "seconds": 0.5,
}
ROOT |= {
    "/sleep": MEMORY,
    "/wake_up": MEMORY,
    "/update_weights_from_disk": MEMORY,
    "/is_sleeping": {"is_sleeping": True, "level": 1},
    "/reset_prefix_cache": {"object": "prefix_cache.reset", "reset": True},
}
RANKED = {
    "id": "rerank-1",
    "model": "m",
    "score_type": "cosine_similarity",
    "usage": {"prompt_tokens": 5, "total_tokens": 5},
    "results": [{"index": 1, "relevance_score": 0.5, "document": {"text": "b"}}],
}
SCORED = {
    "id": "score-1",
    "object": "list",
    "created": 1,
    "model": "m",
    "score_type": "cosine_similarity",
    "data": [{"index": 0, "object": "score", "score": 0.5}],
    "usage": {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2},
}
TIMELINE = {
    "id": "cmpl-1",
    "object": "request.timeline",
    "state": "running",
    "arrival": 1.5,
    "grammar_seconds": 0.0,
    "prompt_tokens": 9,
    "cached_tokens": {"full": 0, "partial": 0, "fork": 0},
    "waiting_before": 0,
    "waits": [{"index": 0, "start": 0.0, "seconds": 0.25, "ended": True, "reasons": {"rows": 0.25}}],
    "chunks": [{"index": 0, "start": 0.25, "seconds": None, "tokens": 9, "resumes": False}],
    "preemptions": [],
    "choices": [],
    "omitted": 0,
}
PIN = {"id": "pin-1", "object": "cache.pin", "pinned_tokens": 32, "blocks": 2}
WARMED = {"object": "cache.warmed_prompt", "index": 0, "prompt_tokens": 40, "cached_tokens": 3, "warm_tokens": 32}
CACHE = {
    ("POST", "warm"): {"object": "list", "data": [WARMED], "model": "m"},
    ("POST", "pins"): PIN,
    ("GET", "pins"): {"object": "list", "data": [PIN]},
    ("DELETE", "pin-1"): {"id": "pin-1", "object": "cache.pin.deleted", "deleted": True},
}

ADAPTER = {"id": "pirate", "object": "adapter", "parent": "m", "digest": "ab", "rank": 16, "bytes": 1024}
ADAPTERS = {
    "load_lora_adapter": ADAPTER,
    "unload_lora_adapter": {"id": "pirate", "object": "adapter.unloaded", "unloaded": True},
}

TEXT = {"type": "output_text", "text": "Paris.", "annotations": []}
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [TEXT]}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": [MESSAGE],
}
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
}
LINES = "".join(
    json.dumps({"id": "r", "custom_id": name, "response": {"status_code": 200, "request_id": "q", "body": RESPONSE}})
    + "\n"
    for name in ("France", "Italy")
)


def answer(request: httpx2.Request) -> httpx2.Response:
    """What an Octavo server answers."""
    path = request.url.path
    if "/v1/cache/" in path:
        return httpx2.Response(200, json=CACHE[request.method, path.rpartition("/")[2]])
    if path.endswith("/content"):
        return httpx2.Response(200, text=LINES)
    for name, stored in (("responses", RESPONSE), ("files", FILE), ("batches", BATCH)):
        if f"/v1/{name}" in path:
            return httpx2.Response(200, json=stored)
    body = json.loads(request.content) if request.content else {}
    if path.endswith("/chat/completions"):
        return _events(CHAT_CHUNKS) if body.get("stream") else httpx2.Response(200, json=CHAT)
    if path.endswith("/completions"):
        return _events([COMPLETION]) if body.get("stream") else httpx2.Response(200, json=COMPLETION)
    if path.endswith("/embeddings"):
        return httpx2.Response(200, json=EMBEDDING)
    if path.endswith("/rerank"):
        return httpx2.Response(200, json=RANKED)
    if path.endswith("/score"):
        return httpx2.Response(200, json=SCORED)
    if path.endswith("/timeline"):
        return httpx2.Response(200, json=TIMELINE)
    if path.endswith("/models"):
        return httpx2.Response(200, json={"object": "list", "data": []})
    if request.method == "DELETE" and "/v1/requests/" in path:
        request_id = path.partition("/v1/requests/")[2]
        return httpx2.Response(200, json={"id": request_id, "object": "request.released", "released": True})
    if (adapter := ADAPTERS.get(path.rpartition("/")[2])) is not None:
        return httpx2.Response(200, json=adapter)
    name = "/" + path.rpartition("/")[2]
    if name in ROOT:
        return httpx2.Response(200, json=ROOT[name])
    error = {"message": f"no route {path}", "type": "invalid_request_error", "param": None, "code": None}
    return httpx2.Response(404, json={"error": error})


def _events(chunks: Iterable[dict[str, Any]]) -> httpx2.Response:
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return httpx2.Response(200, text=events, headers={"content-type": "text/event-stream; charset=utf-8"})


class Caller:
    """Makes clients of one kind, records what they send, and hides whether their methods are awaited."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.requests: list[httpx2.Request] = []
        self.answer: Callable[[httpx2.Request], httpx2.Response] = answer

    @property
    def body(self) -> Any:
        """The JSON body of the last request."""
        return json.loads(self.requests[-1].content)

    @property
    def url(self) -> str:
        """The address of the last request."""
        return str(self.requests[-1].url)

    def client(self, **options: Any) -> Any:
        """Make an Octavo client whose requests end in this process."""
        return (Octavo if self.kind == "sync" else AsyncOctavo)(http_client=self._http_client(), **options)

    def plain_client(self) -> Any:
        """Make the SDK's own client whose requests end in this process."""
        kind = openai.OpenAI if self.kind == "sync" else openai.AsyncOpenAI
        return kind(api_key="k", base_url="http://test/v1", http_client=self._http_client())

    def run(self, result: Any) -> Any:
        """Return a result, awaited if it has to be."""
        if not inspect.isawaitable(result):
            return result
        return asyncio.run(_await(result))

    def collect(self, stream: Any) -> list[Any]:
        """Return all that a stream brings."""
        return list(stream) if self.kind == "sync" else asyncio.run(_collect(stream))

    def enter(self, manager: Any, use: Callable[[Any], Any]) -> Any:
        """Return what `use` makes of a context manager's value."""
        if self.kind == "sync":
            with manager as value:
                return use(value)
        return asyncio.run(_enter(manager, use))

    def _http_client(self) -> Any:
        transport = httpx2.MockTransport(self._handle)
        return (httpx2.Client if self.kind == "sync" else httpx2.AsyncClient)(transport=transport)

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return self.answer(request)


async def _await(result: Awaitable[Any]) -> Any:
    return await result


async def _collect(stream: Awaitable[AsyncIterable[Any]]) -> list[Any]:
    return [item async for item in await stream]


async def _enter(manager: Any, use: Callable[[Any], Any]) -> Any:
    async with manager as value:
        result = use(value)
        return await result if inspect.isawaitable(result) else result


@pytest.fixture(params=["sync", "async"])
def caller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Caller:
    for name in ("OCTAVO_API_KEY", "OCTAVO_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return Caller(request.param)
