"""The cases of the throughput benchmark: what is asked, of how many requests, how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workload import WorkloadRequest, make_fixed_workload, make_prefix_workload, make_workload, with_text

Make = Callable[[int, int, Sequence[int]], list[WorkloadRequest]]
"""(number of requests, seed, token ids of a text) -> workload"""


@dataclass(frozen=True)
class Case:
    """One question put to every engine.

    `context` is the most tokens a sequence reaches. `num_requests` holds where the command line names no number;
    a case with `one_size` takes no other.
    """

    name: str
    title: str
    make: Make
    num_requests: int
    context: int
    n: int = 1
    shares_prefix: bool = False
    one_size: bool = False


def _sharegpt(num_requests: int, seed: int, token_ids: Sequence[int]) -> list[WorkloadRequest]:
    return with_text(make_workload(num_requests, seed), token_ids, seed)


def _prefix(num_requests: int, seed: int, token_ids: Sequence[int]) -> list[WorkloadRequest]:
    return make_prefix_workload(num_requests, seed, token_ids)


def _single(num_requests: int, seed: int, token_ids: Sequence[int]) -> list[WorkloadRequest]:
    return make_fixed_workload(num_requests, seed, token_ids, prompt_length=64, output_length=448)


def _long(num_requests: int, seed: int, token_ids: Sequence[int]) -> list[WorkloadRequest]:
    return make_fixed_workload(num_requests, seed, token_ids, prompt_length=3584, output_length=256)


CASES = {
    case.name: case
    for case in (
        Case("offline", "ShareGPT-like lengths, all requests at once", _sharegpt, 48, 1536),
        Case("n3", "ShareGPT-like lengths, 3 samples a request", _sharegpt, 48, 1536, n=3),
        Case("prefix", "8 groups that share 1024 tokens", _prefix, 48, 1536, shares_prefix=True),
        Case("single", "one stream up to 512 tokens", _single, 1, 512, one_size=True),
        Case("long", "prompts of 3584 tokens, outputs of 256", _long, 8, 3840, one_size=True),
        Case("online", "requests over HTTP as a Poisson process", _sharegpt, 48, 1536),
    )
}
