"""Latency of an Octavo server under load: requests arrive as a Poisson process, answers are streamed over HTTP.

    python benchmarks/online_latency.py workload.json --mode fast --rate 2.5

Starts `octavo serve` in a process of its own, sends each request at its time whatever the others do, and prints one
JSON line. TTFT is the time from sending a request to its first text; inter-token latency is the time between events
that bring text, over all requests (a character that takes several tokens comes as one event); both in ms, p50 and p99.
`load_seconds` is the time from the server's start until it is ready; `peak_rss_mb` is the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
from workload import WorkloadRequest

from octavo_client import AsyncOctavo, Extras, Octavo

START_LIMIT = 300  # seconds until the server must be ready


@dataclass(frozen=True)
class Answer:
    """When the texts of one answer came, in seconds after its request was sent, and how many tokens it had."""

    arrivals: tuple[float, ...]
    num_tokens: int

    @property
    def intervals(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextlib.contextmanager
def server(options: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `octavo serve` for as long as the block lasts."""
    program = str(Path(sys.executable).with_name("octavo"))
    command = [program, "serve", *options, "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(client: Octavo, process: subprocess.Popen[bytes]) -> str:
    """Wait for the server; return the name of its model."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with exit code {process.returncode} before it was ready")
        try:
            client.server.ready()
            return client.models.list().data[0].id
        except (openai.APIConnectionError, openai.InternalServerError):
            time.sleep(0.05)
    sys.exit(f"the server was not ready after {START_LIMIT} s")


async def answer(client: AsyncOctavo, model: str, request: WorkloadRequest, delay: float) -> Answer:
    """Send one request after a delay and note when its texts come."""
    await asyncio.sleep(delay)
    started = time.perf_counter()
    arrivals: list[float] = []
    num_tokens = 0
    stream = await client.completions.create(
        model=model,
        prompt=request["prompt_ids"],
        max_tokens=request["out"],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=Extras(ignore_eos=True),
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            arrivals.append(time.perf_counter() - started)
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
    if num_tokens != request["out"]:
        raise RuntimeError(f"{request['out']} tokens were expected, {num_tokens} came")
    return Answer(tuple(arrivals), num_tokens)


async def offer(base_url: str, model: str, requests: list[WorkloadRequest], rate: float, seed: int) -> list[Answer]:
    """Offer the requests at `rate` per second with exponential gaps; return all answers."""
    rng = random.Random(seed)
    delays, now = [], 0.0
    for _ in requests:
        delays.append(now)
        now += rng.expovariate(rate)
    async with AsyncOctavo(base_url=base_url, max_retries=0) as client:
        pairs = zip(requests, delays, strict=True)
        return await asyncio.gather(*(answer(client, model, request, delay) for request, delay in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--mode", default=None, help="exact or fast; the server's default if left out")
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--seed", type=int, default=7, help="of the arrivals")
    arguments = parser.parse_args()
    requests: list[WorkloadRequest] = json.loads(arguments.workload.read_text())
    options = [arguments.model] if arguments.model else []
    if arguments.mode is not None:
        options += ["--mode", arguments.mode]
    port = free_port()
    base_url = f"http://127.0.0.1:{port}/v1"
    launched = time.monotonic()
    with server(options, port) as process:
        with Octavo(base_url=base_url, max_retries=0) as client:
            model = wait_until_ready(client, process)
        load_seconds = time.monotonic() - launched
        # The warm-up has other prompts, so that nothing measured is in the prefix cache.
        warm_up = [WorkloadRequest(prompt_ids=r["prompt_ids"][::-1], out=min(r["out"], 16)) for r in requests[:2]]
        asyncio.run(offer(base_url, model, warm_up, 100.0, 0))
        started = time.perf_counter()
        answers = asyncio.run(offer(base_url, model, requests, arguments.rate, arguments.seed))
        seconds = time.perf_counter() - started
    first = [1000 * a.arrivals[0] for a in answers if a.arrivals]
    between = [1000 * interval for a in answers for interval in a.intervals]
    num_output_tokens = sum(a.num_tokens for a in answers)
    line = {
        "engine": "octavo",
        "settings": {"mode": arguments.mode, "rate": arguments.rate, "seed": arguments.seed},
        "seconds": round(seconds, 2),
        "requests_per_s": round(len(answers) / seconds, 3),
        "output_tokens_per_s": round(num_output_tokens / seconds, 1),
        **{f"ttft_p{p}_ms": round(float(np.percentile(first, p)), 1) for p in (50, 99)},
        **{f"itl_p{p}_ms": round(float(np.percentile(between, p)), 2) for p in (50, 99)},
        "load_seconds": round(load_seconds, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
