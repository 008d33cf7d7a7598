"""Clients that vanish: within one step their blocks are free, wherever their request was and however it was asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
from byte_engine import BLOCK_SIZE, Gate, byte_engine

from octavo_engine.async_engine import AsyncEngine
from octavo_server import create_app
from octavo_server.serving import listen, make_server

LONG = "x" * 200  # several steps of prefill
BODIES = {
    "/v1/completions": {"prompt": LONG, "max_tokens": 100},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 100},
    "/v1/responses": {"input": LONG, "max_output_tokens": 100, "store": False},
    "/generate": {"inputs": LONG, "parameters": {"max_new_tokens": 100}},
    "/v1/messages": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 100},
}
HOLDER = {"prompt": "y" * 30, "max_tokens": 300, "stream": True}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[AsyncEngine, Gate, int]]:
    """An engine of one sequence at a time, its gate, and the port that it is served at."""
    gate = Gate()
    engine = byte_engine(gate, max_num_seqs=1, prefix_cache=False)
    with listen("127.0.0.1", 0) as listening:
        server = make_server(create_app(engine))
        server.capture_signals = nullcontext  # a thread cannot take signals
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield engine, gate, listening.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join(10)
    gate.open()
    engine.close()


def ask(port: int, path: str, body: dict[str, object]) -> socket.socket:
    path = "/generate_stream" if path == "/generate" and body["stream"] else path
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within five seconds"
        time.sleep(0.002)


def until_idle(engine: AsyncEngine, gate: Gate) -> int:
    """Let everything end; return the number of steps so far."""
    gate.open()
    wait_for(lambda: not (engine.stats().num_running or engine.stats().num_waiting or engine._commands))
    return engine.stats().num_steps


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_steps", [2, 20], ids=["prefill", "decode"])
def test_one_step_after_a_client_vanished_its_blocks_are_free(served, path, stream, num_steps):
    engine, gate, port = served
    before = until_idle(engine, gate)
    gate.allow_only(num_steps)
    with ask(port, path, BODIES[path] | {"stream": stream}):
        wait_for(lambda: engine.stats().num_steps == before + num_steps + 1)  # the next one waits at the gate
        assert engine.stats().cache.num_used > num_steps * BLOCK_SIZE // 2
    wait_for(lambda: bool(engine._commands))  # the abort has come, and the step at the gate is in its way
    gate.steps.release()
    wait_for(lambda: engine.stats().cache.num_used == 0)
    assert engine.stats().num_steps == before + num_steps + 1
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
def test_one_step_after_a_client_vanished_it_is_out_of_the_queue(served, path, stream):
    engine, gate, port = served
    before = until_idle(engine, gate)
    gate.allow_only(5)
    with ask(port, "/v1/completions", HOLDER):
        wait_for(lambda: engine.stats().num_steps == before + 6)
        with ask(port, path, BODIES[path] | {"stream": stream}):
            wait_for(lambda: bool(engine._commands))
            gate.steps.release()
            wait_for(lambda: engine.stats().num_waiting == 1)
            wait_for(lambda: engine.stats().num_steps == before + 7)
        wait_for(lambda: bool(engine._commands))
        gate.steps.release()
        wait_for(lambda: engine.stats().num_waiting == 0)
        assert engine.stats().num_running == 1
        gate.open()
    wait_for(lambda: engine.stats().cache.num_used == 0)
