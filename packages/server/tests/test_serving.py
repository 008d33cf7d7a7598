"""The server on a real socket: what only a connection shows."""

import asyncio
import json
import re
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx2
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from octavo_client import Extras, Octavo
from octavo_engine.errors import InvalidConfig
from octavo_server import serving
from octavo_server.outlet import Outlet
from octavo_server.serving import listen

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
BODIES = {
    "chat": (CHAT, {"messages": [USER]}),
    "chat stream": (CHAT, {"messages": [USER], "stream": True}),
    "text": (TEXT, {"prompt": "a"}),
    "text stream": (TEXT, {"prompt": "a", "stream": True}),
    "two prompts": (TEXT, {"prompt": ["a", "b"]}),
    "two prompts stream": (TEXT, {"prompt": ["a", "b"], "stream": True}),
}


def connect(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=5)


def raw_request(path, body):
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def read_all(connection):
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def counter(url, name, **labels):
    for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("hold_after", [0, 3], ids=["before the first token", "between tokens"])
def test_a_client_that_leaves_aborts_its_request_at_once(serve, engine, wait_until, kind, hold_after):
    engine.hold_after = hold_after
    url = serve(engine)
    path, body = BODIES[kind]
    num_requests = 2 if "two" in kind else 1
    with connect(url) as connection:
        connection.sendall(raw_request(path, body))
        wait_until(lambda: engine.num_running == num_requests)
    wait_until(lambda: engine.num_running == 0)
    assert len(engine.aborted) == num_requests
    wait_until(lambda: counter(url, "octavo_http_requests_total", route=path, status="499") == 1)
    assert counter(url, "octavo_requests_aborted_total") == num_requests
    assert counter(url, "octavo_num_requests_running") == 0
    assert counter(url, "octavo_request_success_total", finished_reason="stop") == 0
    engine.hold_after = None
    assert httpx2.post(f"{url}{TEXT}", json={"prompt": "a"}).status_code == 200


def test_a_client_that_leaves_aborts_its_embeddings(serve, engine, wait_until):
    engine.hold_after = 0
    with connect(serve(engine)) as connection:
        connection.sendall(raw_request("/v1/embeddings", {"input": ["a", "b"]}))
        wait_until(lambda: engine.num_running == 2)
    wait_until(lambda: len(engine.aborted) == 2)
    assert engine.num_running == 0


def test_a_client_that_leaves_while_sending_its_body_is_forgotten(serve, engine, wait_until):
    url = serve(engine)
    with connect(url) as connection:
        connection.sendall(raw_request(TEXT, {"prompt": "abc"})[:-5])
    wait_until(lambda: counter(url, "octavo_http_requests_total", route=TEXT, status="499") == 1)
    assert engine.requests == []


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_a_body_that_is_too_large_gets_its_answer(serve, engine, chunked):
    url = serve(engine, max_body_bytes=100_000)
    content = (b"x" * 65536 for _ in range(20)) if chunked else b"x" * 1_300_000
    response = httpx2.post(f"{url}{TEXT}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert httpx2.get(f"{url}/health").status_code == 200


def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_asked_for(serve, engine):
    with connect(serve(engine, max_body_bytes=100)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n"
        )
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_comes_too_slowly_is_408(serve, engine):
    with connect(serve(engine, body_timeout=0.05)) as connection:
        connection.sendall(raw_request(TEXT, {"prompt": "abc"})[:-5])
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 70_000,
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000,
        b"GET /health HTTP/1.1\r\nhost: x\r\na: \0\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    ],
    ids=[
        "no HTTP",
        "length is no number",
        "negative length",
        "broken chunk",
        "large headers",
        "many headers",
        "NUL",
        "no host",
        "two lengths",
    ],
)
def test_broken_http_is_400_in_openai_shape_and_closes(serve, engine, request_bytes):
    url = serve(engine)
    with connect(url) as connection:
        connection.sendall(request_bytes)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert b"connection: close" in head.lower()
    assert b'"error"' in body
    assert httpx2.get(f"{url}/health").status_code == 200


def test_headers_that_do_not_come_close_the_connection(serve, engine, monkeypatch):
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.05)
    url = serve(engine)
    for beginning in (b"", b"GET /health HTTP/1.1\r\nhos", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea"):
        with connect(url) as connection:
            connection.sendall(beginning)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200 ") is beginning.endswith(b"GET /hea")


def test_an_idle_connection_outlives_the_time_for_headers(serve, engine, monkeypatch):
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.05)
    with connect(serve(engine)) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(65536)
            connection.settimeout(0.1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(5)


@pytest.mark.parametrize("num_idle", [400, pytest.param(4000, marks=pytest.mark.slow)])
def test_idle_connections_do_not_keep_others_out(serve, engine, num_idle):
    serving.allow_many_connections()
    url = serve(engine)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(num_idle)]
        for connection in idle[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost:")
        assert httpx2.post(f"{url}{TEXT}", json={"prompt": "a"}).status_code == 200
    assert httpx2.get(f"{url}/health").status_code == 200


def test_a_connection_that_stays_idle_is_closed(serve, engine, monkeypatch):
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.1)
    with connect(serve(engine)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_connection_is_kept_for_the_next_request(serve, engine):
    with httpx2.Client(base_url=serve(engine)) as client:
        assert [client.get("/health").status_code for _ in range(3)] == [200, 200, 200]


def test_chunks_arrive_as_they_are_made(serve, engine, wait_until):
    engine.hold_after = 3
    with httpx2.stream("POST", f"{serve(engine)}{CHAT}", json={"messages": [USER], "stream": True}) as response:
        lines = response.iter_lines()
        events = [json.loads(line.removeprefix("data: ")) for line in (next(lines) for _ in range(7)) if line]
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", " ", "P", "a"]
    wait_until(lambda: engine.num_running == 0)


def test_many_requests_run_side_by_side(serve, engine):
    url = serve(engine)

    async def run():
        async with httpx2.AsyncClient(base_url=url) as client:
            posts = [client.post(TEXT, json={"prompt": f"{i}", "echo": True}) for i in range(50)]
            return [response.json()["choices"][0]["text"] for response in await asyncio.gather(*posts)]

    assert asyncio.run(run()) == [f"{i} Paris." for i in range(50)]


def test_the_openai_sdk_is_served(serve, engine):
    with OpenAI(base_url=f"{serve(engine)}/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions.create(model="org/fake-model", messages=[USER], logprobs=True, top_logprobs=2)
        assert chat.choices[0].message.content == " Paris."
        assert chat.choices[0].logprobs.content[1].token == "P"
        chunks = list(
            client.chat.completions.create(
                model="org/fake-model", messages=[USER], stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == " Paris."
        assert chunks[-1].usage.completion_tokens == 8
        text = client.completions.create(model="org/fake-model", prompt="a", logprobs=1)
        assert text.choices[0].logprobs.tokens == list(" Paris.")
        embedding = client.embeddings.create(model="org/fake-model", input="a").data[0].embedding
        assert embedding == pytest.approx([0.6, -0.8])
        assert client.models.retrieve("org/fake-model").id == "org/fake-model"
        with pytest.raises(NotFoundError) as not_found:
            client.models.retrieve("nope")
        assert not_found.value.code == "model_not_found"
        with pytest.raises(BadRequestError) as refused:
            client.chat.completions.create(model="org/fake-model", messages=[USER], temperature=3)
        assert refused.value.param == "temperature"


def test_the_typed_client_is_served(serve, engine):
    with Octavo(base_url=f"{serve(engine, api_keys=('k',))}/v1", api_key="k", max_retries=0) as client:
        extras = Extras(top_k=5, min_p=0.1, stop_token_ids=[3], priority=2, cache_salt="s")
        client.chat.completions.create(model="org/fake-model", messages=[USER], extra_body=extras)
        request = engine.requests[0]
        assert (request.sampling.top_k, request.sampling.min_p, request.priority) == (5, 0.1, 2)
        assert client.tokens.tokenize("ab").tokens == [97, 98]
        assert client.tokens.detokenize([97, 98]).prompt == "ab"
        assert client.server.health().status == "ok"
        assert client.server.ready().models == ["org/fake-model"]
        assert "octavo-server" in client.server.version().packages


def test_an_error_in_a_stream_is_raised_by_the_openai_sdk(serve, engine):
    engine.fail_after = 2
    with OpenAI(base_url=f"{serve(engine)}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="org/fake-model", prompt="a", stream=True)
        with pytest.raises(Exception, match="the engine could not compute this request"):
            list(stream)


def test_a_port_in_use_is_a_clear_error():
    with listen("127.0.0.1", 0) as first, pytest.raises(InvalidConfig, match="choose another --host or --port"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("not.a.host.invalid", 0)])
def test_an_address_that_cannot_be_used_is_a_clear_error(host, port):
    with pytest.raises(InvalidConfig, match="cannot listen on"):
        listen(host, port)


def test_a_reader_that_pauses_misses_nothing(engine, serve, wait_until, monkeypatch):
    waits = []
    send_unsent = Outlet._send_unsent
    monkeypatch.setattr(Outlet, "_send_unsent", lambda outlet: waits.append(1) or send_unsent(outlet))
    url = serve(engine)
    engine.replies = ["".join(f" {i}" for i in range(150))]
    body = {
        "prompt": list("abcdef"),
        "max_tokens": 150,
        "logprobs": 20,
        "n": 8,
        "return_token_ids": True,
    }  # more than sockets hold
    expected = httpx2.post(f"{url}{TEXT}", json=body).json()["choices"]
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((urlsplit(url).hostname, urlsplit(url).port))
    with connection:
        connection.sendall(raw_request(TEXT, body | {"stream": True}))
        wait_until(lambda: len(engine.requests) == 12 and engine.num_running == 0)  # six prompts, asked twice
        received = b""
        while b"data: [DONE]" not in received[-100:]:
            received += connection.recv(65536)
    texts = [""] * 48
    for line in re.findall(rb"data: (\{.*\})", received):
        (choice,) = json.loads(line)["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in expected]
    assert waits  # the connection was full
