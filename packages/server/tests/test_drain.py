"""The end of a server: a process that gets SIGTERM takes no more requests and lets those in progress end."""

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

TEXT = "/v1/completions"

SERVER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from conftest import FakeEngine
from octavo_server import create_app
from octavo_server.serving import listen, make_server

class SlowEngine(FakeEngine):
    async def generate(self, request):
        async for deltas in super().generate(request):
            yield deltas
            await asyncio.sleep({pace})

with listen("127.0.0.1", 0) as listening:
    app = create_app(SlowEngine())
    print(listening.getsockname()[1], flush=True)
    make_server(app, drain=app.state.server.drain, drain_seconds={seconds}).run(sockets=[listening])
print("stopped", flush=True)
"""


@contextlib.contextmanager
def server(pace=0.05, seconds=10.0):
    code = SERVER.format(tests=str(Path(__file__).parent), pace=pace, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


class Posted(threading.Thread):
    """A request in a thread of its own; `answer` is its response once it has ended."""

    def __init__(self, url, **body):
        super().__init__()
        self.url, self.body = url, {"prompt": "a", **body}
        self.answer = None
        self.start()

    def run(self):
        self.answer = httpx2.post(f"{self.url}{TEXT}", json=self.body, timeout=20)


def wait_for(url, num_requests):
    deadline = time.monotonic() + 10
    while f"octavo_num_requests_running {num_requests}.0" not in httpx2.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_in_progress_end_and_new_ones_are_told_to_go_elsewhere():
    with server(pace=0.5) as (process, url), httpx2.Client() as client:
        posts = [Posted(url), Posted(url, stream=True)]
        wait_for(url, 2)
        assert client.get(f"{url}/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        while (ready := client.get(f"{url}/ready")).status_code == 200:
            pass
        assert ready.status_code == 503
        assert client.get(f"{url}/health").status_code == 200
        refused = client.post(f"{url}{TEXT}", json={"prompt": "b"})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) > 0
        for post in posts:
            post.join(10)
        assert posts[0].answer.json()["choices"][0]["text"] == " Paris."
        assert posts[1].answer.text.endswith("data: [DONE]\n\n")
        assert process.wait(10) == 0
        assert process.stdout.read() == "stopped\n"


def test_a_body_that_is_not_wanted_does_not_take_the_refusal_away():
    with server(pace=0.5) as (process, url):
        post = Posted(url)
        wait_for(url, 1)
        process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{url}/ready").status_code == 200:
            pass
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            body = b" " * (4 << 20)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            connection.sendall(body)
            received = b""
            while data := connection.recv(65536):
                received += data
        assert received.startswith(b"HTTP/1.1 503 ")
        assert b"shutting_down" in received
        post.join(10)
        assert post.answer.status_code == 200


@pytest.mark.slow
def test_what_has_not_ended_in_time_ends_with_an_error():
    with server(pace=30, seconds=0.3) as (process, url):
        posts = [Posted(url), Posted(url, stream=True)]
        wait_for(url, 2)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for post in posts:
            post.join(10)
        assert posts[0].answer.status_code == 503
        assert posts[0].answer.json()["error"]["code"] == "shutting_down"
        last = posts[1].answer.text.rstrip("\n").split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(10) == 0
        assert 0.3 <= time.monotonic() - started < 5
        assert "2 requests had not ended and were cut off" in process.stderr.read()


@pytest.mark.slow
def test_a_second_signal_ends_at_once():
    with server(pace=30, seconds=60) as (process, url):
        post = Posted(url)
        wait_for(url, 1)
        process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{url}/ready").status_code == 200:
            pass
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 3
        post.join(10)
        assert post.answer.status_code == 503


@pytest.mark.slow
def test_an_idle_server_with_open_connections_ends_at_once():
    with server() as (process, url):
        port = int(re.search(r":(\d+)$", url).group(1))
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        with httpx2.Client() as kept:
            kept.get(f"{url}/health")
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert time.monotonic() - started < 3
        for connection in connections:
            assert select.select([connection], [], [], 2)[0]
            connection.close()


@pytest.mark.parametrize("path", [TEXT, "/v1/chat/completions"])
def test_a_stream_that_is_cut_off_ends_with_an_error_event(client, engine, path, monkeypatch):
    engine.hold_after = 3
    end_all = client.app.state.server.drain.end_all
    monkeypatch.setattr(engine.holding, "set", lambda: engine.loop.call_soon(end_all))
    body = {"prompt": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    response = client.post(path, json=body)
    assert response.status_code == 200
    *chunks, last = (json.loads(event.removeprefix("data: ")) for event in response.text.strip().split("\n\n"))
    assert last["error"]["code"] == "shutting_down"
    assert len(chunks) >= 3
    assert all("choices" in chunk for chunk in chunks)
    assert len(engine.aborted) == 1
    assert engine.num_running == 0
    assert 'octavo_requests_cut_off_total{reason="shutting_down"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("path", [TEXT, "/v1/models", "/nothing"])
def test_while_draining_every_route_but_the_monitors_is_503(client, path):
    client.app.state.server.drain.begin(10)
    assert client.get(path).status_code == 503
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503
    assert 'octavo_admission_rejections_total{reason="shutting_down"} 1.0' in client.get("/metrics").text
