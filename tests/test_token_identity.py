"""Greedy tokens of the whole engine on the real model, held against Transformers in float32.

Transformers runs once over prompt + our output on the dequantised weights of the same file. Each of our tokens must be
its arg-max, or lie within `TIE` of it: float32 sums in another order can swap two logits that are as good as equal.
Such near-ties are counted, printed, and may not pass 1 %.
"""

from __future__ import annotations

import argparse
import collections
import email.message
import heapq
import inspect
import json
import random
import textwrap
from collections.abc import Callable, Sequence

import pytest
import torch
from demo_oracle import demo_oracle

from octavo_engine import LLM, SamplingParams

pytestmark = pytest.mark.model

TIE = 5e-4
MAX_NEAR_TIES = 0.01
NUM_OUTPUT_TOKENS = 64
PROMPT_LENGTHS = [1, 2, 5, 15, 16, 17, 31, 33, 64, 65, 100, 127, 180, 256, 257, 333, 420, 555, 700, 900]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
CHUNKED = {"max_num_batched_tokens": 64, "prefix_cache": True, "show_progress": False}

Tokens = tuple[int, ...]
Check = Callable[[Sequence[Tokens], Sequence[Tokens]], None]


@pytest.fixture(scope="module")
def prompts() -> list[Tokens]:
    """Cut 20 prompts out of real text; every fourth begins like the one before, so that the prefix cache is used."""
    llm = LLM(num_blocks=64, show_progress=False)
    text = "\n\n".join(
        inspect.getdoc(module) or inspect.getsource(module)
        for module in (argparse, textwrap, heapq, random, json, collections, email.message)
    )
    ids = llm._text.encode_prompt(text + "\nzażółć gęślą jaźń, 你好, 世界! 🙂\n" + inspect.getsource(textwrap))
    llm.close()
    rng = random.Random(20)
    cut: list[Tokens] = []
    for place, length in enumerate(PROMPT_LENGTHS):
        start = rng.randrange(len(ids) - length)
        tokens = tuple(ids[start : start + length])
        if place % 4 == 3:
            shared = cut[-1][: len(cut[-1]) // 2 + 8]
            tokens = shared + tokens[len(shared) :]
        cut.append(tokens)
    return cut


@pytest.fixture(scope="module")
def check() -> Check:
    """Hold outputs against the reference; equal outputs are looked at once."""
    reference = demo_oracle()
    seen: dict[Tokens, list[float]] = {}

    def gaps(prompt: Tokens, output: Tokens) -> list[float]:
        """How far each output token's logit lies below the largest one."""
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output]), logits_to_keep=len(output) + 1).logits[0, :-1]
        return (logits.amax(-1) - logits.gather(-1, torch.tensor(output)[:, None])[:, 0]).tolist()

    def check(prompts: Sequence[Tokens], outputs: Sequence[Tokens]) -> None:
        everything: list[float] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            assert len(output) == NUM_OUTPUT_TOKENS
            if prompt + output not in seen:
                seen[prompt + output] = gaps(prompt, output)
            everything += seen[prompt + output]
        near_ties = sum(gap > 0 for gap in everything)
        print(f"\n{len(everything)} tokens: {near_ties} near-ties, largest gap {max(everything):.2e}")
        assert max(everything) <= TIE
        assert near_ties <= MAX_NEAR_TIES * len(everything)

    return check


def run(llm: LLM, prompts: Sequence[Tokens]) -> list[Tokens]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def test_twenty_prompts_at_once_in_chunks_equal_transformers(prompts: list[Tokens], check: Check) -> None:
    with LLM(**CHUNKED) as llm:
        check(prompts, run(llm, prompts))
        stats = llm.stats()
    assert stats.num_preemptions == 0
    assert stats.num_cached_prompt_tokens > 0
    assert stats.cache.num_used == 0


def test_one_prompt_at_a_time_equals_transformers(prompts: list[Tokens], check: Check) -> None:
    with LLM(**CHUNKED) as llm:
        outputs = [run(llm, [prompt])[0] for prompt in prompts]
    check(prompts, outputs)


def test_a_pool_so_small_that_sequences_are_preempted_equals_transformers(prompts: list[Tokens], check: Check) -> None:
    with LLM(num_blocks=68, **CHUNKED) as llm:
        check(prompts, run(llm, prompts))
        stats = llm.stats()
    print(f"{stats.num_preemptions} preemptions")
    assert stats.num_preemptions > 0
    assert stats.cache.num_used == 0
