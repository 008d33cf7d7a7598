"""Drawing tokens from the logits of a vocabulary of 128256, counted in passes over them at copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import octavo_kernels as ok
from on_device.bench import Bench

TARGETS = {"greedy": 1.3, "temperature": 1.3, "top_k and top_p": 4.0}  # passes


def run(bench: Bench) -> None:
    ceilings = bench.ceilings()
    vocab_size = bench.size(128_256, 100)
    for batch in (1, 32, 256) if not bench.smoke else (2,):
        for name, most in TARGETS.items():
            num_bytes = batch * vocab_size * 4
            calls = [_call(bench, name, batch, vocab_size) for _ in range(bench.num_copies(num_bytes))]
            with bench.attempt(f"{name}, {batch} rows"):
                seconds = bench.seconds(calls)
                passes = seconds * ceilings.copy / num_bytes
                bench.add(f"{name}, {batch} rows", value=passes, at_most=most, unit="passes", us=seconds * 1e6)


def _call(bench: Bench, name: str, batch: int, vocab_size: int) -> Callable[[], object]:
    device = bench.device
    logits = torch.randn(batch, vocab_size, device=device)
    rows = torch.arange(batch, device=device)
    temperature = torch.full((batch,), 0.0 if name == "greedy" else 0.8, device=device)
    options: dict[str, Any] = {"seeds": rows + 7, "sequence_index": rows, "positions": rows + 100}
    if name == "top_k and top_p":
        options |= {"top_k": torch.full_like(rows, 50), "top_p": torch.full((batch,), 0.9, device=device)}
    return lambda: ok.sample_tokens(logits, temperature, **options)
