"""Offline throughput of Octavo on a workload: all requests offered at once, greedy, end-of-text ignored.

    python benchmarks/offline_throughput.py workload.json --model model.gguf

Prints one JSON line: output and total tokens per second, tokens per second of a single stream of 128 tokens, load time
and peak memory. `compare.py` puts such lines of several engines side by side.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from workload import WorkloadRequest

from octavo_engine import LLM, SamplingParams

SINGLE_STREAM_TOKENS = 128


def run(llm: LLM, requests: list[WorkloadRequest]) -> float:
    """Run the requests at once and return the seconds it took; checks that every token asked for came."""
    sampling = [SamplingParams(temperature=0, max_tokens=r["out"], ignore_eos=True) for r in requests]
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": r["prompt_ids"]} for r in requests], sampling)
    seconds = time.perf_counter() - started
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    if lengths != [r["out"] for r in requests]:
        raise RuntimeError(f"expected outputs of {[r['out'] for r in requests]} tokens, got {lengths}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--no-prefix-cache", action="store_true")
    arguments = parser.parse_args()
    requests: list[WorkloadRequest] = json.loads(arguments.workload.read_text())

    started = time.perf_counter()
    settings = {
        "dtype": arguments.dtype,
        "max_num_seqs": arguments.max_num_seqs,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "prefix_cache": not arguments.no_prefix_cache,
    }
    llm = LLM(arguments.model, show_progress=False, **settings)
    load_seconds = time.perf_counter() - started
    run(llm, requests[:2])  # warm-up

    seconds = run(llm, requests)
    single = run(llm, [{"prompt_ids": requests[0]["prompt_ids"], "out": SINGLE_STREAM_TOKENS}])
    num_output_tokens = sum(r["out"] for r in requests)
    num_tokens = num_output_tokens + sum(len(r["prompt_ids"]) for r in requests)
    line = {
        "engine": "octavo",
        "settings": settings | {"dtype": llm.info.dtype, "kernels": llm.info.kernel_backend},
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(num_output_tokens / seconds, 1),
        "total_tokens_per_s": round(num_tokens / seconds, 1),
        "single_stream_tokens_per_s": round(SINGLE_STREAM_TOKENS / single, 1),
        "load_seconds": round(load_seconds, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
