"""Every kernel against the reference in float64, on inputs that punish careless ones, and bits across batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import octavo_kernels as ok
from octavo_kernels.testing import make_paged_inputs, tolerance
from on_device.backends import by_compiled_attention, served_by, why_not_compiled
from on_device.bench import Bench
from on_device.product_kinds import packed_weight
from on_device.row_kernels import checksums_of_a_step

FP8 = torch.float8_e4m3fn
_UNEQUAL = 0.02


@dataclass(frozen=True)
class Maker:
    """Makes the inputs of a case: the same numbers for the kernel, in bf16, and for the reference, in float64."""

    device: torch.device
    wide: bool
    smoke: bool

    def cast(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to the device; what is bf16 for the kernel is the same numbers in float64 for the oracle."""
        moved = tensor.to(self.device)
        return moved.double() if self.wide and moved.dtype in (torch.bfloat16, torch.float32) else moved

    def normal(self, *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return self.cast((scale * torch.randn(shape, generator=generator)).to(dtype))

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randint(low, high, shape, generator=generator).to(dtype).to(self.device)

    def size(self, full: int, smoke: int) -> int:
        return smoke if self.smoke else full


Case = Callable[[Maker], Tensor]


def run(bench: Bench) -> None:
    for name, case in _cases(smoke=bench.smoke):
        bench.check_time()
        actual = case(Maker(bench.device, False, bench.smoke))
        with served_by("reference"):
            expected = case(Maker(bench.device, True, bench.smoke))
        bench.add(name, value=_error(actual, expected), at_most=1.0, unit="of the tolerance")
        bench.free()
    for name, same in _bits(bench):
        bench.add(name, same_bits=same)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of what is allowed; infinite where one is NaN and the other not.

    Of whole numbers (tokens, codes) a few may differ, where the last bits of a float decide.
    """
    if not actual.dtype.is_floating_point:
        return float((actual != expected).double().mean()) / _UNEQUAL
    rtol, atol = tolerance(actual.dtype)
    a, e = actual.double(), expected.double()
    if not torch.equal(a.isnan(), e.isnan()):
        return float("inf")
    off = torch.where(a == e, 0.0, (a - e).abs() / (atol + rtol * e.abs())).nan_to_num(nan=0.0)
    return float(off.max()) if off.numel() else 0.0


def _cases(*, smoke: bool) -> Iterator[tuple[str, Case]]:
    """Yield all cases by name; a smoke run has one of each kind."""
    yield "paged_attention, decode", lambda m: _attention(m, [1] * 6, [1, 15, 16, 17, 300, 1000])
    yield "paged_attention, chunks and decode", lambda m: _attention(m, [130, 1, 64, 1], [130, 40, 200, 513])
    yield (
        "paged_attention, window, soft cap, sinks",
        lambda m: _attention(m, [70, 1, 5], [100, 333, 5], window=50, soft_cap=20.0, sinks=m.normal(8).float()),
    )
    yield from _compiled_attention(smoke=smoke)
    yield "shared_prefix_attention", _shared
    yield "mla_decode", _latent
    yield "varlen_attention", _varlen
    yield "rope_kv_write", _rope
    yield "rope_kv_write_quant", _rope_codes
    yield "copy_blocks", _copies
    yield "rms_norm", lambda m: ok.rms_norm(m.normal(65, 4096), m.normal(4096), 1e-5)
    yield (
        "add_rms_norm",
        lambda m: ok.add_rms_norm(m.normal(65, 4096), m.normal(65, 4096, seed=1), m.normal(4096), 1e-5),
    )
    yield "silu_and_mul", lambda m: ok.silu_and_mul(m.normal(65, 2 * 1000))
    yield "gelu_and_mul", lambda m: ok.gelu_and_mul(m.normal(65, 2 * 1000), approximate="tanh")
    for dtype in (torch.int8, FP8):
        name = str(dtype).removeprefix("torch.")
        yield f"quantize_rows to {name}", lambda m, d=dtype: _codes(ok.quantize_rows(m.normal(65, 4096), d))
        yield f"rms_norm_quant to {name}", lambda m, d=dtype: _codes(_normed(m, d))
        yield f"silu_and_mul_quant to {name}", lambda m, d=dtype: _codes(ok.silu_and_mul_quant(m.normal(65, 2000), d))
    yield "merge_states", _merge
    yield "apply_token_bitmask", _bitmask
    yield "sample_tokens, greedy", lambda m: _sampled(m, 0.0)
    yield "sample_tokens, top_k and top_p", lambda m: _sampled(m, 0.8, top_k=20, top_p=0.9)
    yield "apply_filters", _filtered
    yield "apply_penalties", _penalised
    yield "token_logprobs", lambda m: ok.token_logprobs(*_logits(m), 3)[0]
    yield "rejection_sample", _judged
    yield "update_rows, expand_rows, advance_rows", checksums_of_a_step
    for rows in (1, 17, 40, 130) if not smoke else (3,):
        yield f"weight_only_linear, 4 bits, {rows} rows", lambda m, rows=rows: _weight_only(m, rows, 4, 128)
    yield "weight_only_linear, 4 bits in groups of 32", lambda m: _weight_only(m, m.size(40, 3), 4, 32)
    yield "weight_only_linear, 8 bits", lambda m: _weight_only(m, m.size(17, 3), 8, 128)
    for form in (ok.WeightFormat.Q4_0, ok.WeightFormat.Q8_0, ok.WeightFormat.Q4_K, ok.WeightFormat.Q6_K):
        for rows in (1, 40, 130) if not smoke else (3,):
            yield f"packed_linear, {form.value}, {rows} rows", lambda m, rows=rows, form=form: _packed(m, rows, form)
        yield f"packed_embedding, {form.value}", lambda m, form=form: _embedded(m, form)
    for rows in (1, 40, 130) if not smoke else (3,):
        yield f"scaled_linear, FP8 by blocks, {rows} rows", lambda m, rows=rows: _scaled(m, rows, FP8, blocks=True)
        yield f"scaled_linear, FP8 by rows, {rows} rows", lambda m, rows=rows: _scaled(m, rows, FP8, blocks=False)
        yield f"scaled_linear, int8, {rows} rows", lambda m, rows=rows: _scaled(m, rows, torch.int8, blocks=False)
    for tokens in (1, 33, 300) if not smoke else (3,):
        yield f"fused_moe, {tokens} tokens", lambda m, tokens=tokens: _mixture(m, tokens)
    yield "lora_shrink and lora_expand", _adapters


def _compiled_attention(*, smoke: bool) -> Iterator[tuple[str, Case]]:
    """Yield cases of attention in CUDA C++, where a build of it is installed; Triton's kernel has such above."""
    if smoke or why_not_compiled() is not None:
        return
    many = [1] * 6, [1, 15, 16, 17, 300, 1000]
    mixed = [130, 1, 5, 1], [130, 40, 200, 5130]

    def case(make: Maker, query_lens: list[int], seq_lens: list[int], options: dict[str, Any]) -> Tensor:
        call = partial(_attention, make, query_lens, seq_lens, **options)
        return call() if make.wide else by_compiled_attention(partial(call, batch_invariant=False))()

    yield "paged_attention in CUDA C++, decode", lambda m: case(m, *many, {})
    yield "paged_attention in CUDA C++, chunks and decode", lambda m: case(m, *mixed, {})
    yield (
        "paged_attention in CUDA C++, window, soft cap, sinks",
        lambda m: case(m, *mixed, {"window": 50, "soft_cap": 20.0, "sinks": m.normal(8).float()}),
    )


def _attention(make: Maker, query_lens: list[int], seq_lens: list[int], **options: Any) -> Tensor:
    if make.smoke:
        query_lens, seq_lens = [min(n, 3) for n in query_lens[:2]], [min(n, 18) for n in seq_lens[:2]]
    inputs = make_paged_inputs(
        query_lens, seq_lens, num_heads=8, num_kv_heads=2, head_dim=make.size(128, 16), dtype=torch.bfloat16,
        device=make.device, seed=3,
    )  # fmt: skip
    if make.wide:
        inputs = inputs.to(torch.float64)
    return ok.paged_attention(**inputs.arguments(), **options)


def _shared(make: Maker) -> Tensor:
    lengths = [100, 333, 64] if not make.smoke else [18, 20]
    inputs = make_paged_inputs(
        [1] * len(lengths), lengths, num_heads=8, num_kv_heads=2, head_dim=make.size(128, 16), dtype=torch.bfloat16,
        device=make.device, seed=3,
    )  # fmt: skip
    if make.wide:
        inputs = inputs.to(torch.float64)
    inputs.block_table[:, 0] = inputs.block_table[0, 0]
    starts, shared = (torch.tensor(n, dtype=torch.int32, device=make.device) for n in ([0, len(lengths)], [16]))
    groups = ok.SharedPrefixes(starts, shared, len(lengths))
    return ok.shared_prefix_attention(shared=groups, **inputs.arguments())


def _latent(make: Maker) -> Tensor:
    """One latent vector for all heads: the sizes of DeepSeek's decode."""
    latent, rope, heads = make.size(512, 32), make.size(64, 16), make.size(32, 4)
    lengths = [1, 17, 300] if not make.smoke else [3, 18]
    num_blocks = -(-max(lengths) // 16)
    table = torch.arange(len(lengths) * num_blocks, dtype=torch.int32, device=make.device).view(len(lengths), -1)
    cache = make.normal(len(lengths) * num_blocks, 16, latent + rope)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=make.device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=make.device)
    q_nope, q_pe = make.normal(len(lengths), heads, latent), make.normal(len(lengths), heads, rope, seed=1)
    return ok.mla_decode(q_nope, q_pe, cache, starts, seq_lens, table, scale=(latent + rope) ** -0.5)


def _varlen(make: Maker) -> Tensor:
    lengths, dim = ([1, 64, 65], 128) if not make.smoke else ([1, 5], 16)
    starts = torch.tensor([0, *lengths], device=make.device).cumsum(0).to(torch.int32)
    q, k, v = (make.normal(sum(lengths), heads, dim, seed=heads) for heads in (8, 2, 2))
    return ok.varlen_attention(
        q, k, v, starts, starts, max_query_len=max(lengths), max_key_len=max(lengths), scale=dim**-0.5, causal=False
    )


def _codes(result: tuple[Tensor, Tensor]) -> Tensor:
    return result[0].view(torch.int8)


def _normed(make: Maker, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ok.rms_norm_quant(make.normal(65, 4096), make.normal(4096), 1e-5, dtype)


def _rope(make: Maker) -> Tensor:
    dim = make.size(128, 16)
    q, k, v = (make.normal(20, heads, dim, seed=heads) for heads in (8, 2, 2))
    cache = make.normal(4, 2, 2, 16, dim)
    slots = torch.tensor([-1, *range(20, 39)], device=make.device)
    cos_sin = make.normal(64, dim, dtype=torch.float32)
    norms = {"q_norm_weight": make.normal(dim), "k_norm_weight": make.normal(dim, seed=1), "eps": 1e-6}
    positions = torch.arange(20, device=make.device)
    ok.rope_kv_write(q, k, v, positions, cos_sin.float(), cache[:, 0], cache[:, 1], slots, **norms)
    return torch.cat([q.flatten(), k.flatten(), cache.flatten()])


def _rope_codes(make: Maker) -> Tensor:
    dim = make.size(128, 16)
    q, k, v = (make.normal(20, heads, dim, seed=heads) for heads in (8, 2, 2))
    cache = torch.zeros(4, 2, 2, 16, dim, dtype=torch.int8, device=make.device)
    scales = torch.zeros(2, 4, 2, 16, device=make.device)
    slots, positions = torch.arange(20, 40, device=make.device), torch.arange(20, device=make.device)
    cos_sin = make.normal(64, dim, dtype=torch.float32).float()
    ok.rope_kv_write_quant(q, k, v, positions, cos_sin, cache[:, 0], cache[:, 1], slots, scales[0], scales[1])
    return cache


def _copies(make: Maker) -> Tensor:
    cache = make.normal(6, 2, 2, 16, 16)
    ids = torch.tensor([1, 4, 2], device=make.device)
    ok.copy_blocks([cache[:, 0], cache[:, 1]], ids, ids.roll(1))
    return cache


def _merge(make: Maker) -> Tensor:
    a, b = make.normal(9, 4, 64), make.normal(9, 4, 64, seed=1)
    lse_a, lse_b = (
        make.normal(9, 4, dtype=torch.float32).float(),
        make.normal(9, 4, seed=1, dtype=torch.float32).float(),
    )
    lse_a[0] = float("-inf")
    return ok.merge_states(a, lse_a, b, lse_b)[0]


def _bitmask(make: Maker) -> Tensor:
    logits = make.normal(3, 1000, dtype=torch.float32).float()
    ok.apply_token_bitmask(logits, make.integers(-(1 << 31), 1 << 31, 3, 32, dtype=torch.int32))
    return logits


def _logits(make: Maker) -> tuple[Tensor, Tensor]:
    """Make logits, and a token per row."""
    rows, vocab_size = make.size(64, 3), make.size(128_256, 100)
    logits = make.normal(rows, vocab_size, dtype=torch.float32).float()
    return logits, make.integers(0, vocab_size, rows)


def _penalised(make: Maker) -> Tensor:
    logits, _ = _logits(make)
    counts = make.integers(0, 3, *logits.shape, dtype=torch.int32)
    prompt = make.integers(-(1 << 31), 1 << 31, len(logits), -(-logits.shape[1] // 32), dtype=torch.int32)
    factors = (torch.full((len(logits),), value, device=make.device) for value in (1.3, 0.2, 0.1))
    return ok.apply_penalties(
        logits, counts, prompt, **dict(zip(("repetition", "frequency", "presence"), factors, strict=True))
    )


def _judged(make: Maker) -> Tensor:
    """Sequences of two drafts each, greedy, so that the last bits decide nothing."""
    logits, drafts = _logits(make)
    num_seqs = len(logits) // 3
    logits, drafts = logits[: 3 * num_seqs], drafts[: 3 * num_seqs]
    drafts[::3] = logits[::3].argmax(-1)
    index = torch.arange(num_seqs, device=make.device)
    starts = torch.arange(0, 3 * num_seqs + 1, 3, dtype=torch.int32, device=make.device)
    return ok.rejection_sample(
        logits, drafts, starts, torch.zeros(num_seqs, device=make.device), max_num_drafts=2, seeds=index,
        sequence_index=index, positions=index,
    )[0]  # fmt: skip


def _filtered(make: Maker) -> Tensor:
    rows = make.size(64, 3)
    logits = make.normal(rows, make.size(128_256, 100), dtype=torch.float32).float()
    heat, top_p = (torch.full((rows,), value, device=make.device) for value in (0.8, 0.9))
    return ok.apply_filters(logits, heat, top_p=top_p).isfinite().to(torch.int32)


def _sampled(make: Maker, temperature: float, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    rows, vocab_size = make.size(64, 3), make.size(128_256, 100)
    logits = make.normal(rows, vocab_size, dtype=torch.float32).float()
    index = torch.arange(rows, device=make.device)
    options: dict[str, Tensor] = {}
    if top_k:
        options = {"top_k": torch.full_like(index, top_k), "top_p": torch.full((rows,), top_p, device=make.device)}
    heat = torch.full((rows,), temperature, device=make.device)
    return ok.sample_tokens(logits, heat, seeds=index + 5, sequence_index=index, positions=index, **options)[0]


def _weight_only(make: Maker, rows: int, bits: int, group_size: int) -> Tensor:
    in_features, out_features = make.size(4096, 256), make.size(2000, 40)
    codes = make.integers(0, 1 << bits, in_features, out_features)
    shape = (in_features // group_size, out_features)
    scales = (make.integers(1, 100, *shape).float() / 50_000).half()
    zeros = make.integers(0, 1 << bits, *shape)
    weight = ok.int_weight_from_codes(codes, scales, bits=bits, group_size=group_size, zeros=zeros)
    return ok.weight_only_linear(make.normal(rows, in_features), weight)


def _stored(make: Maker, form: ok.WeightFormat) -> ok.PackedWeight:
    weight = packed_weight(form, make.size(2000, 40), make.size(4096, 256))
    return replace(weight, data=weight.data.to(make.device))


def _packed(make: Maker, rows: int, form: ok.WeightFormat) -> Tensor:
    """The reference takes fp32 and computes in float64; its result is rounded as the kernel's is."""
    weight = _stored(make, form)
    x = make.normal(rows, weight.in_features)
    return ok.packed_linear(x.float() if make.wide else x, weight).to(torch.bfloat16)


def _embedded(make: Maker, form: ok.WeightFormat) -> Tensor:
    weight = _stored(make, form)
    return ok.packed_embedding(weight, make.integers(0, weight.out_features, 65))


def _scaled(make: Maker, rows: int, dtype: torch.dtype, *, blocks: bool) -> Tensor:
    in_features, out_features = make.size(4096, 256), make.size(2000, 40)
    x, weight = (make.integers(-100, 100, n, in_features).to(dtype) for n in (rows, out_features))
    w_shape = (-(-out_features // 128), in_features // 128) if blocks else (out_features, 1)
    x_shape = (rows, in_features // 128) if blocks else (rows, 1)
    x_scale, w_scale = (make.integers(1, 100, *shape).float() / 500_000 for shape in (x_shape, w_shape))
    return ok.scaled_linear(x, weight, x_scale, w_scale, out_dtype=torch.float32).to(torch.bfloat16)


def _mixture(make: Maker, tokens: int) -> Tensor:
    hidden, intermediate = make.size(1024, 64), make.size(1500, 48)
    w13 = make.normal(8, 2 * intermediate, hidden, scale=hidden**-0.5)
    w2 = make.normal(8, hidden, intermediate, scale=intermediate**-0.5)
    weights, ids = make.integers(0, 1000, tokens, 8).float().softmax(-1).topk(2)
    return ok.fused_moe(make.normal(tokens, hidden), w13, w2, weights, ids.to(torch.int32))


def _adapters(make: Maker) -> Tensor:
    tokens, in_features, out_features = make.size(70, 5), make.size(4096, 64), make.size(2000, 40)
    ranks = torch.tensor([16, 64, 8], dtype=torch.int32, device=make.device)
    a, b = make.normal(3, 64, in_features, scale=in_features**-0.5), make.normal(3, out_features, 64, scale=0.125)
    ids = make.integers(-1, 3, tokens)
    groups = ok.group_rows(ids, 3)
    shrunk = ok.lora_shrink(make.normal(tokens, in_features), a, groups, ranks)
    scales = torch.tensor([2.0, 0.5, 1.0], device=make.device)
    return ok.lora_expand(shrunk, b, groups, ranks, scales, make.normal(tokens, out_features))


def _bits(bench: Bench) -> Iterator[tuple[str, bool]]:
    """Yield whether a row's bits are the same alone and in batches whose tiles are higher."""
    make = Maker(bench.device, False, bench.smoke)
    yield "paged_attention, each sequence alone as among others", _attention_bits(make)
    in_features, out_features = make.size(4096, 256), make.size(2000, 40)
    codes = make.integers(0, 16, in_features, out_features)
    scales = (make.integers(1, 100, in_features // 128, out_features).float() / 50_000).half()
    weight = ok.int_weight_from_codes(codes, scales, bits=4, group_size=128, zero_point=8)
    x = make.normal(make.size(200, 40), in_features)
    alone = ok.weight_only_linear(x[:1], weight)
    for rows in (16, 32, 64, 200) if not bench.smoke else (16,):
        yield (
            f"weight_only_linear, 1 row as among {rows}",
            torch.equal(ok.weight_only_linear(x[:rows], weight)[:1], alone),
        )
    fp8_x, fp8_weight = (make.integers(-100, 100, n, in_features).to(FP8) for n in (200, out_features))
    one = torch.ones(1, 1, device=bench.device) / 1000
    alone = ok.scaled_linear(fp8_x[:1], fp8_weight, one, one)
    for rows in (16, 32, 64, 200) if not bench.smoke else (16,):
        together = ok.scaled_linear(fp8_x[:rows], fp8_weight, one, one)
        yield f"scaled_linear, FP8, 1 row as among {rows}", torch.equal(together[:1], alone)


def _attention_bits(make: Maker) -> bool:
    lengths = [1, 300, 1000, 5000, 17, 64] if not make.smoke else [17, 40]
    inputs = make_paged_inputs(
        [1] * len(lengths), lengths, num_heads=8, num_kv_heads=2, head_dim=make.size(128, 16), dtype=torch.bfloat16,
        device=make.device, seed=5,
    )  # fmt: skip
    together = ok.paged_attention(**inputs.arguments())
    one = torch.tensor([0, 1], dtype=torch.int32, device=make.device)
    for row in range(len(lengths)):
        part = slice(row, row + 1)
        alone = ok.paged_attention(
            inputs.q[part], inputs.k_cache, inputs.v_cache, one, inputs.seq_lens[part], inputs.block_table[part],
            max_query_len=1, scale=inputs.scale,
        )  # fmt: skip
        if not torch.equal(alone, together[part]):
            return False
    return True
