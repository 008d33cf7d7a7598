"""Attention: decode as a share of copy bandwidth, prefill in TFLOP/s, beside torch's and FlashInfer's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import octavo_kernels as ok
from on_device.backends import by_compiled_attention, why_not_compiled
from on_device.bench import Bench

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
DECODE = (  # name, lengths of the sequences, target as a share of copy bandwidth
    ("64 MB of KV, 16 sequences of 1024", [1024] * 16, 0.55),
    ("1 GB of KV, 64 sequences of 4096", [4096] * 64, 0.8),
    ("lengths apart, one of 32768 and 63 of 512", [32768] + [512] * 63, None),
    ("one sequence of 1024", [1024], None),
)
PREFILL = (2048, 8192, 16384)
PREFILL_TARGET = 400.0  # TFLOP/s

Call = Callable[[], Tensor]


def run(bench: Bench) -> None:
    ceilings = bench.ceilings()
    bench.add("copy, read and written", value=ceilings.copy / 1e12, unit="TB/s")
    for name, lengths, target in DECODE if not bench.smoke else (("small", [17, 40], None),):
        _decode(bench, name, lengths, target, ceilings.copy)
    _shared(bench)
    for length in PREFILL if not bench.smoke else (20,):
        _prefill(bench, length)


def _decode(bench: Bench, name: str, lengths: Sequence[int], target: float | None, copy: float) -> None:
    num_bytes = sum(lengths) * 2 * NUM_KV_HEADS * HEAD_DIM * 2
    num_copies = bench.num_copies(num_bytes)
    contenders = {
        "octavo": lambda: _paged(bench, lengths, [1] * len(lengths), batch_invariant=False),
        "octavo, CUDA C++": lambda: by_compiled_attention(
            _paged(bench, lengths, [1] * len(lengths), batch_invariant=False)
        ),
        "octavo, batch-invariant": lambda: _paged(bench, lengths, [1] * len(lengths)),
        "torch SDPA, contiguous": lambda: _sdpa_decode(bench, lengths),
        "FlexAttention, contiguous": lambda: _flex_decode(bench, lengths),
        "FlashInfer": lambda: _flashinfer(bench, lengths),
    }
    for contender, make in contenders.items():
        title = f"decode, {name}: {contender}"
        if contender == "FlashInfer" and importlib.util.find_spec("flashinfer") is None:
            continue
        if contender == "octavo, CUDA C++" and why_not_compiled() is not None:
            bench.add(title, not_measured=why_not_compiled())
            continue
        if contender == "FlexAttention, contiguous" and bench.smoke:
            continue  # it compiles, which is not what a smoke run is for
        with bench.attempt(title, ours=contender.startswith("octavo")):
            seconds = bench.seconds([make() for _ in range(num_copies)])
            figures = {"value": num_bytes / seconds / copy, "unit": "of copy", "us": seconds * 1e6}
            if target is not None and contender in ("octavo", "octavo, CUDA C++"):
                figures["target"] = target
            bench.add(title, **figures)


def _shared(bench: Bench) -> None:
    """Sequences that begin alike: read once, beside each by itself."""
    num_seqs, num_blocks = bench.size(64, 2), bench.size(256, 1)
    lengths = [num_blocks * BLOCK_SIZE + bench.size(256, 5)] * num_seqs
    title = f"decode of {num_seqs} sequences that share {num_blocks * BLOCK_SIZE} tokens"
    with bench.attempt(title):
        alone = bench.seconds([_paged(bench, lengths, [1] * num_seqs, batch_invariant=False, shared=0)])
        once = bench.seconds([_paged(bench, lengths, [1] * num_seqs, shared=num_blocks)])
        bench.add(title, value=alone / once, unit="times paged_attention", us=once * 1e6)


def _prefill(bench: Bench, length: int) -> None:
    flops = 4 * NUM_HEADS * HEAD_DIM * length * (length + 1) / 2
    contenders = {
        "octavo": lambda: _paged(bench, [length], [length], batch_invariant=False),
        "torch SDPA": lambda: _sdpa_prefill(bench, length),
        "FlexAttention": lambda: _flex(bench, length),
    }
    for contender, make in contenders.items():
        if contender == "FlexAttention" and bench.smoke:
            continue  # it compiles, which is not what a smoke run is for
        title = f"prefill, causal, {length} tokens: {contender}"
        with bench.attempt(title, ours=contender.startswith("octavo")):
            seconds = bench.seconds([make()])
            figures = {"value": flops / seconds / 1e12, "unit": "TFLOP/s", "us": seconds * 1e6}
            if contender == "octavo" and length >= 8192:
                figures["target"] = PREFILL_TARGET
            bench.add(title, **figures)


def _normal(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, device=bench.device, dtype=torch.float32).to(torch.bfloat16)


def _paged(
    bench: Bench, seq_lens: Sequence[int], query_lens: Sequence[int], *, batch_invariant: bool = True, shared: int = 0
) -> Call:
    """Make a call of ours over blocks in a random order; a number of the first ones are the same for all sequences."""
    device = bench.device
    counts = [-(-length // BLOCK_SIZE) for length in seq_lens]
    order = torch.randperm(sum(counts), device=device, dtype=torch.int32) + 1
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
    for row, part in enumerate(order.split(counts)):
        table[row, : len(part)] = part
    table[:, :shared] = table[:1, :shared]
    cache = _normal(bench, sum(counts) + 1, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    q = _normal(bench, sum(query_lens), NUM_HEADS, HEAD_DIM)
    starts = torch.tensor([0, *query_lens], device=device).cumsum(0).to(torch.int32)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    out, longest, num_seqs = torch.empty_like(q), max(query_lens), len(counts)
    arguments = (q, cache[:, 0], cache[:, 1], starts, lengths, table)
    if shared:
        groups = ok.SharedPrefixes(
            torch.tensor([0, num_seqs], dtype=torch.int32, device=device),
            torch.tensor([shared * BLOCK_SIZE], dtype=torch.int32, device=device),
            num_seqs,
        )
        size = ok.shared_prefix_workspace(
            len(q), num_seqs, 1, table.shape[1], BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM,
            max_query_len=longest, max_group_query_len=num_seqs,
        )  # fmt: skip
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        return lambda: ok.shared_prefix_attention(
            *arguments, groups, max_query_len=longest, scale=SCALE, out=out, workspace=workspace
        )
    size = ok.attention_workspace(
        num_seqs, max(seq_lens), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, max_query_len=longest
    )  # fmt: skip
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    return lambda: ok.paged_attention(
        *arguments, max_query_len=longest, scale=SCALE, batch_invariant=batch_invariant, out=out, workspace=workspace
    )


def _contiguous(bench: Bench, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Make keys without blocks: what a product without a block table reads at best."""
    if len(set(lengths)) > 1 and not bench.smoke:
        raise ValueError("lengths differ, and there is no block table")
    shape = (len(lengths), NUM_KV_HEADS, lengths[0], HEAD_DIM)
    return _normal(bench, len(lengths), NUM_HEADS, 1, HEAD_DIM), _normal(bench, *shape), _normal(bench, *shape)


def _sdpa_decode(bench: Bench, lengths: Sequence[int]) -> Call:
    q, k, v = _contiguous(bench, lengths)
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True)


def _flex_decode(bench: Bench, lengths: Sequence[int]) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = _contiguous(bench, lengths)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, scale=SCALE, enable_gqa=True)


def _dense(bench: Bench, length: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    q, k, v = (_normal(bench, 1, count, length, HEAD_DIM) for count in heads)
    return q, k, v


def _sdpa_prefill(bench: Bench, length: int) -> Call:
    q, k, v = _dense(bench, length)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)


def _flex(bench: Bench, length: int) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _dense(bench, length)

    def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:  # noqa: ARG001
        return row >= column

    mask = create_block_mask(causal, None, None, length, length, bench.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)


def _flashinfer(bench: Bench, lengths: Sequence[int]) -> Call:
    import flashinfer

    counts = torch.tensor([-(-length // BLOCK_SIZE) for length in lengths])
    num_blocks = int(counts.sum())
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32).to(bench.device)
    indices = torch.randperm(num_blocks, device=bench.device, dtype=torch.int32)
    last = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in lengths], dtype=torch.int32, device=bench.device)
    cache = _normal(bench, num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    q = _normal(bench, len(lengths), NUM_HEADS, HEAD_DIM)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        indptr, indices, last, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
        q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=SCALE,
    )  # fmt: skip
    return lambda: wrapper.run(q, cache)
