"""Offline throughput of Octavo on a workload: all requests offered at once, greedy, end-of-text ignored.

    python benchmarks/offline_throughput.py workload.json --model model.gguf --mode fast

Prints one JSON line: output and total tokens per second, tokens per second of a single stream of 128 tokens, load time
and peak memory. With `--n` above 1 each request has that many samples, drawn at temperature 1. `compare.py` puts such
lines of several engines side by side. The warm-up uses other prompts, so that nothing measured is in the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from memory import peak_rss_mb
from workload import WorkloadRequest

from octavo_engine import LLM, SamplingParams

SINGLE_STREAM_TOKENS = 128


def run(llm: LLM, requests: list[WorkloadRequest], n: int = 1) -> float:
    """Run the requests at once and return the seconds it took; checks that every token asked for came."""
    temperature = 0.0 if n == 1 else 1.0
    sampling = [
        SamplingParams(n=n, temperature=temperature, seed=place, max_tokens=r["out"], ignore_eos=True)
        for place, r in enumerate(requests)
    ]
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": r["prompt_ids"]} for r in requests], sampling)
    seconds = time.perf_counter() - started
    lengths = [len(choice.token_ids) for output in outputs for choice in output.outputs]
    if lengths != [r["out"] for r in requests for _ in range(n)]:
        raise RuntimeError(f"{n} outputs of {[r['out'] for r in requests]} tokens each were expected, got {lengths}")
    return seconds


def reversed_prompts(requests: list[WorkloadRequest]) -> list[WorkloadRequest]:
    """Return requests as long, whose prompts share no block with these."""
    return [WorkloadRequest(prompt_ids=r["prompt_ids"][::-1], out=r["out"]) for r in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--mode", default=None, help="exact or fast; the engine's default if left out")
    parser.add_argument("--n", type=int, default=1, help="samples a request; above 1 at temperature 1")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--no-prefix-cache", action="store_true")
    arguments = parser.parse_args()
    requests: list[WorkloadRequest] = json.loads(arguments.workload.read_text())

    started = time.perf_counter()
    settings: dict[str, Any] = {
        "dtype": arguments.dtype,
        "max_num_seqs": arguments.max_num_seqs,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "prefix_cache": not arguments.no_prefix_cache,
    }
    if arguments.mode is not None:
        settings["mode"] = arguments.mode
    llm = LLM(arguments.model, show_progress=False, **settings)
    load_seconds = time.perf_counter() - started
    run(llm, reversed_prompts(requests[:2]), arguments.n)

    seconds = run(llm, requests, arguments.n)
    first = reversed_prompts(requests[:1])[0]["prompt_ids"]
    rotated = first[1:] + first[:1]
    single = run(llm, [WorkloadRequest(prompt_ids=rotated, out=SINGLE_STREAM_TOKENS)])
    num_output_tokens = sum(r["out"] for r in requests) * arguments.n
    num_tokens = num_output_tokens + sum(len(r["prompt_ids"]) for r in requests)
    line = {
        "engine": "octavo",
        "settings": settings | {"n": arguments.n, "dtype": llm.info.dtype, "kernels": llm.info.kernel_backend},
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(num_output_tokens / seconds, 1),
        "total_tokens_per_s": round(num_tokens / seconds, 1),
        "single_stream_tokens_per_s": round(SINGLE_STREAM_TOKENS / single, 1),
        "load_seconds": round(load_seconds, 1),
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
