"""Perplexity of `exact` and `fast` on English prose, beside Transformers in fp32 on the dequantised weights.

    python benchmarks/perplexity.py --oracle gguf --out benchmarks/results/perplexity
    python benchmarks/perplexity.py --tokens 2048 --modes exact
    python benchmarks/perplexity.py --modes exact exact/bfloat16 exact/int8 --out benchmarks/results/perplexity_kv

The text is the standard library's own documentation, cut into windows of 512 tokens. Perplexity is the exponential of
the mean negative log-likelihood (natural log) of every token after the first of its window, given the window's earlier
tokens, whose keys and values are read from the KV cache. All contestants run each window in turn; agreement is the
share of positions at which two have the same most likely next token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workload import english_ids

from octavo_engine import EngineConfig
from octavo_engine.build import build_engine
from octavo_engine.runner.model_input import GroupInput, ModelInput
from octavo_engine.runner.model_runner import ModelRunner, caches_of
from octavo_engine.weights.locate import locate_model

Logits = Callable[[list[int]], Tensor]
"""Token ids of a window -> logits [num_tokens, vocab_size] fp32."""


@dataclass
class Score:
    """What one contestant made of the windows so far."""

    sum_nll: float = 0.0
    num_tokens: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.sum_nll / self.num_tokens)

    def add(self, logits: Tensor, token_ids: list[int]) -> Tensor:
        """Take in a window; return the most likely token at each position but the last."""
        targets = torch.tensor(token_ids[1:])
        logprobs = logits[:-1].double().log_softmax(dim=-1)
        self.sum_nll -= float(logprobs.gather(1, targets[:, None]).sum())
        self.num_tokens += len(targets)
        return logits[:-1].argmax(dim=-1)


def octavo(model: str | None, mode: str, window: int) -> Logits:
    """Load our model in a mode, or in one with a KV cache of another dtype: `exact/int8`.

    Its logits come from the runner's own model and KV cache, one step per window.
    """
    mode, _, kv_cache_dtype = mode.partition("/")
    config = EngineConfig(
        model=model,
        mode=mode,
        kv_cache_dtype=kv_cache_dtype or "auto",
        max_num_seqs=1,
        max_model_len=window,
        prefix_cache=False,
    )
    built = build_engine(config)
    runner = built.engine._executor._runner  # the scheduler asks for the logits of last tokens only
    assert isinstance(runner, ModelRunner)

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> Tensor:
        hidden = runner.model(window_input(runner, token_ids))
        return runner.model.logits(hidden)

    return logits


def window_input(runner: ModelRunner, token_ids: list[int]) -> ModelInput:
    """Make the input of one step that computes a whole sequence and wants the logits of all its tokens."""
    num_tokens = len(token_ids)
    block_size = runner.storage.block_size
    positions = torch.arange(num_tokens)
    blocks = torch.arange(1, -(-num_tokens // block_size) + 1, dtype=torch.int32)  # block 0 is reserved
    group = GroupInput(block_table=blocks[None], slot_mapping=positions + block_size)
    return ModelInput(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        max_query_len=num_tokens,
        logits_indices=positions,
        groups=(group,),
        kv_layers=caches_of(runner.model, runner.storage)[0],
    )


def transformers(place: str, model: str | None) -> Logits:
    """Load Transformers' model in fp32: from a folder, or for `gguf` from our model's file, dequantised."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if place == "gguf":
        path = Path(locate_model(model))
        options: dict[str, Any] = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        oracle = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    else:
        oracle = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    oracle = oracle.float().eval()

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> Tensor:
        return oracle(torch.tensor([token_ids])).logits[0]

    return logits


def measure(
    contestants: dict[str, Logits], token_ids: list[int], window: int
) -> tuple[dict[str, Score], dict[str, float]]:
    """Run all windows; return the score of each contestant, and the agreement of each pair by its names."""
    scores = {name: Score() for name in contestants}
    names = list(contestants)
    agreed = {(a, b): 0 for place, a in enumerate(names) for b in names[place + 1 :]}
    for start in range(0, len(token_ids) - window + 1, window):
        ids = token_ids[start : start + window]
        best = {name: scores[name].add(logits(ids), ids) for name, logits in contestants.items()}
        for a, b in agreed:
            agreed[a, b] += int((best[a] == best[b]).sum())
    num_tokens = scores[names[0]].num_tokens
    return scores, {f"{a}, {b}": count / num_tokens for (a, b), count in agreed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"], help="MODE or MODE/KV_CACHE_DTYPE")
    parser.add_argument("--oracle", help="folder of a Transformers model in fp32, or gguf for our model's own file")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write OUT.json")
    arguments = parser.parse_args()
    token_ids = english_ids(arguments.model)[: arguments.tokens]
    if len(token_ids) < arguments.window:
        parser.error(f"--tokens: {len(token_ids)} tokens do not fill a window of {arguments.window}")
    contestants = {mode: octavo(arguments.model, mode, arguments.window) for mode in arguments.modes}
    if arguments.oracle:
        contestants["transformers"] = transformers(arguments.oracle, arguments.model)
    scores, agreement = measure(contestants, token_ids, arguments.window)

    first = scores[arguments.modes[0]].perplexity
    for name, score in scores.items():
        relative = f"{score.perplexity / first:.5f} x {arguments.modes[0]}"
        print(f"{name:12} perplexity {score.perplexity:.4f} over {score.num_tokens} tokens, {relative}")
    for pair, share in agreement.items():
        print(f"{pair}: the same most likely token at {share:.2%} of positions")
    if arguments.out:
        document = {
            "window": arguments.window,
            "perplexity": {name: score.perplexity for name, score in scores.items()},
            "num_tokens": scores[arguments.modes[0]].num_tokens,
            "agreement": agreement,
        }
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
