"""Makes workloads with ShareGPT-like lengths: log-normal, means as published for ShareGPT, outputs shortened.

The PagedAttention paper (arXiv 2309.06180, section 6.1) reports means of 161 prompt and 338 output tokens; for a small
machine the outputs are shortened to 200. Prompts are random token ids: lengths decide speed and memory, words do not.

    python benchmarks/workload.py --requests 64 --seed 7 --out workload.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import TypedDict


class WorkloadRequest(TypedDict):
    prompt_ids: list[int]
    out: int


def lognormal_length(rng: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    """Draw a length in tokens whose distribution has this mean before it is clipped."""
    return max(low, min(high, int(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def make_workload(
    num_requests: int, seed: int, *, prompt_mean: float = 161, output_mean: float = 200, vocab_size: int = 49152
) -> list[WorkloadRequest]:
    """Draw prompts and output lengths; the same arguments give the same workload."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        prompt_length = lognormal_length(rng, prompt_mean, 1.0, 4, 1024)
        output_length = lognormal_length(rng, output_mean, 0.8, 4, 512)
        prompt = [rng.randrange(100, vocab_size) for _ in range(prompt_length)]
        requests.append(WorkloadRequest(prompt_ids=prompt, out=output_length))
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    requests = make_workload(arguments.requests, arguments.seed)
    arguments.out.write_text(json.dumps(requests))
    num_prompt_tokens = sum(len(r["prompt_ids"]) for r in requests)
    print(
        f"{len(requests)} requests, {num_prompt_tokens} prompt tokens, {sum(r['out'] for r in requests)} output tokens"
    )


if __name__ == "__main__":
    main()
