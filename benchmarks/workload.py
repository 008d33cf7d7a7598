"""Makes workloads with ShareGPT-like lengths: log-normal, means as published for ShareGPT, outputs shortened.

The PagedAttention paper (arXiv 2309.06180, section 6.1) reports means of 161 prompt and 338 output tokens; for a small
machine the outputs are shortened to 200. Prompts are random token ids (lengths decide speed and memory, words do not),
or with `--text` English prose: the documentation of the standard library.

    python benchmarks/workload.py --requests 64 --seed 7 --out workload.json
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

TEXT_MODULES = """
argparse asyncio.events codecs collections concurrent.futures.thread contextlib csv datetime decimal difflib doctest
email.message email.policy fractions functools heapq http.client imaplib inspect ipaddress itertools json.decoder
logging mailbox multiprocessing.pool numbers optparse os pathlib pdb pickle pickletools pprint random re sched selectors
shutil smtplib socket statistics string subprocess tarfile textwrap threading timeit tokenize traceback typing
unittest.case unittest.mock urllib.parse urllib.request uuid wave xml.dom.minidom zipfile
"""


class WorkloadRequest(TypedDict):
    prompt_ids: list[int]
    out: int


def lognormal_length(rng: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    """Draw a length in tokens whose distribution has this mean before it is clipped."""
    return max(low, min(high, int(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def english_text() -> str:
    """Return the standard library's own documentation, each docstring once."""
    docs: dict[str, None] = {}
    for name in TEXT_MODULES.split():
        module = importlib.import_module(name)
        for value in (module, *vars(module).values()):
            doc = inspect.getdoc(value)
            if doc and len(doc) > 200:
                docs.setdefault(doc)
    return "\n\n".join(docs)


def english_ids(model: str | None = None) -> list[int]:
    """Return the token ids of `english_text` by a model's tokenizer; None is the demo model's."""
    from octavo_engine.weights.source import open_source

    return open_source(model).tokenizer().encode(english_text(), add_special_tokens=False)


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


def with_text(requests: list[WorkloadRequest], token_ids: Sequence[int], seed: int) -> list[WorkloadRequest]:
    """Return requests of the same lengths whose prompts are slices of a text."""
    rng = random.Random(seed)
    return [WorkloadRequest(prompt_ids=_slice(rng, token_ids, len(r["prompt_ids"])), out=r["out"]) for r in requests]


def make_fixed_workload(
    num_requests: int, seed: int, token_ids: Sequence[int], *, prompt_length: int, output_length: int
) -> list[WorkloadRequest]:
    """Make requests of one length from slices of a text."""
    rng = random.Random(seed)
    return [
        WorkloadRequest(prompt_ids=_slice(rng, token_ids, prompt_length), out=output_length)
        for _ in range(num_requests)
    ]


def make_prefix_workload(
    num_requests: int, seed: int, token_ids: Sequence[int], *, num_groups: int = 8, prefix_length: int = 1024
) -> list[WorkloadRequest]:
    """Make requests of which each group begins with its own prefix, then goes on alone; groups take turns.

    Own parts have a mean of 64 tokens and at most 256, outputs a mean of 100 and at most 256.
    """
    rng = random.Random(seed)
    prefixes = [_slice(rng, token_ids, prefix_length) for _ in range(num_groups)]
    requests = []
    for place in range(num_requests):
        own = _slice(rng, token_ids, lognormal_length(rng, 64, 0.8, 8, 256))
        output_length = lognormal_length(rng, 100, 0.8, 4, 256)
        requests.append(WorkloadRequest(prompt_ids=prefixes[place % num_groups] + own, out=output_length))
    return requests


def describe(requests: list[WorkloadRequest]) -> str:
    """Return the size of a workload in words."""
    num_prompt_tokens = sum(len(r["prompt_ids"]) for r in requests)
    return f"{len(requests)} requests, {num_prompt_tokens} prompt and {sum(r['out'] for r in requests)} output tokens"


def _slice(rng: random.Random, token_ids: Sequence[int], length: int) -> list[int]:
    start = rng.randrange(len(token_ids) - length)
    return list(token_ids[start : start + length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--text", action="store_true", help="prompts of English prose instead of random tokens")
    parser.add_argument("--model", default=None, help="whose tokenizer --text uses; the demo model if left out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    requests = make_workload(arguments.requests, arguments.seed)
    if arguments.text:
        requests = with_text(requests, english_ids(arguments.model), arguments.seed)
    arguments.out.write_text(json.dumps(requests))
    print(describe(requests))


if __name__ == "__main__":
    main()
