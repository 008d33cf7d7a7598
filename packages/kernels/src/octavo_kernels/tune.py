"""A program that measures launch configurations on this machine's GPU, and keeps the best.

    python -m octavo_kernels.tune --format q4_k --shape 4096x4096 --shape 14336x4096 --rows 1 32 64 256

It tries tiles of `packed_linear` for each shape, [out_features]x[in_features], and number of rows, and writes the
fastest to the user's tuning cache, where later processes find it (see `octavo_kernels.tuning`). `--op` names others:

    weight_only_linear  products by int4 or int8 codes (`--bits`), in groups of 128 inputs
    fused_moe           a shape is [intermediate]x[hidden]; `--experts`, of which each row has `--top-k` by chance
    paged_attention     a shape is [num_heads]x[head_dim]; `--kv-heads`, and `--num-seqs` sequences of `--seq-len`
                        tokens, whose last `--rows` are queries: few are a decode step's, many a prefill's
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._options import AttentionOptions
from octavo_kernels.int_weight import IntWeight, int_weight_from_codes
from octavo_kernels.matmul import packed_linear_workspace
from octavo_kernels.moe import moe_tile_rows, moe_workspace
from octavo_kernels.packed_weight import PackedWeight, WeightFormat, packed_num_bytes
from octavo_kernels.tuning import Config, Measured, TuningCache, measure, user_file
from octavo_kernels.weight_only import weight_only_workspace

if TYPE_CHECKING:
    from octavo_kernels.triton._attention_call import AttentionCall

_OPS = ("packed_linear", "weight_only_linear", "fused_moe", "paged_attention")
_BLOCK_SIZE = 16
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("octavo_kernels.tune: no GPU is visible, expected one to measure on; run it where one is\n")
        return 1
    from octavo_kernels.triton._launch import seconds_of

    cache = TuningCache(user_file())
    dtype = _DTYPES[options.dtype]
    for (first, second), num_tokens in itertools.product(options.shape, options.rows):
        best = _tune(options, (first, second), num_tokens, dtype, cache, seconds_of)
        print(f"{num_tokens} rows, {first}x{second}: {best.seconds * 1e6:.1f} us, {dict(best.config)}")
    return 0


def _tune(
    options: argparse.Namespace,
    shape: tuple[int, int],
    num_tokens: int,
    dtype: torch.dtype,
    cache: TuningCache,
    seconds: Callable[[Callable[[], None]], float],
    device: str = "cuda",
) -> Measured:
    """Measure the op that the options name on one shape."""
    if options.op == "paged_attention":
        call = _attention_of(options, shape, num_tokens, dtype, device)
        return tune_paged_attention(call, num_tokens, cache, seconds)
    x = torch.randn(num_tokens, shape[1], device=device).to(dtype)
    if options.op == "packed_linear":
        return tune_packed_linear(x, _zero_weight(WeightFormat(options.format), *shape, device), cache, seconds)
    if options.op == "weight_only_linear":
        return tune_weight_only_linear(x, _zero_codes(options.bits, *shape, device), cache, seconds)
    intermediate, hidden = shape
    w13 = torch.zeros(options.experts, 2 * intermediate, hidden, dtype=dtype, device=device)
    w2 = torch.zeros(options.experts, hidden, intermediate, dtype=dtype, device=device)
    weights, ids = torch.rand(num_tokens, options.experts, device=device).topk(options.top_k)
    return tune_fused_moe(x, w13, w2, weights, ids.int(), cache, seconds)


def tune_packed_linear(
    x: Tensor, weight: PackedWeight, cache: TuningCache, seconds: Callable[[Callable[[], None]], float]
) -> Measured:
    """Measure the tiles of one product and keep the best in the cache.

    Args:
        x: [num_tokens, in_features] fp16 or bf16.
        weight: what it is multiplied by.
        cache: where the result is kept.
        seconds: how long a launch takes; what cannot be launched raises, and does not count.
    """
    from octavo_kernels.triton import matmul

    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    workspace = torch.empty(packed_linear_workspace(len(x), weight), dtype=torch.uint8, device=x.device)
    default = matmul.choose_tile(len(x), x.dtype)

    def launch(config: Config) -> None:
        matmul.packed_linear(x, weight, None, False, out, workspace, matmul.tile_from(default, config))

    best = measure(candidates(), lambda config: _seconds_of(launch, config, seconds))
    cache.keep(matmul.tuning_key(x, weight), best)
    return best


def tune_weight_only_linear(
    x: Tensor, weight: IntWeight, cache: TuningCache, seconds: Callable[[Callable[[], None]], float]
) -> Measured:
    """Measure the tiles of one product by integers and keep the best in the cache; as `tune_packed_linear`."""
    from octavo_kernels.triton import weight_only
    from octavo_kernels.triton._tuned import tuning_key, with_config

    op = "weight_only_linear"
    out = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    workspace = torch.empty(weight_only_workspace(len(x), weight), dtype=torch.uint8, device=x.device)
    default = weight_only.choose_tile(len(x), weight, x.dtype)

    def launch(config: Config) -> None:
        tile = with_config(op, default, weight_only.TUNABLE, config)
        weight_only.weight_only_linear(x, weight, None, out, workspace, tile)

    tried = ({name: config[name] for name in weight_only.TUNABLE} for config in candidates() if config["groups"] == 1)
    best = measure(tried, lambda config: _seconds_of(launch, config, seconds))
    shape = weight_only.tuning_shape(weight)
    cache.keep(tuning_key(op, rows=len(x), shape=shape, dtype=x.dtype, device=x.device), best)
    return best


def tune_fused_moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    cache: TuningCache,
    seconds: Callable[[Callable[[], None]], float],
) -> Measured:
    """Measure the tiles of a mixture of experts and keep the best in the cache; as `tune_packed_linear`.

    The tensors are those of `fused_moe`. Launches with another number of rows share what is kept if their tiles have as
    many rows.
    """
    from octavo_kernels.triton import moe
    from octavo_kernels.triton._tuned import tuning_key, with_config

    op, (num_tokens, hidden), (num_experts, _, intermediate) = "fused_moe", x.shape, w2.shape
    out, top_k = torch.empty_like(x), topk_ids.shape[1]
    num_bytes = moe_workspace(num_tokens, top_k, num_experts, hidden, intermediate, x.dtype)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=x.device)
    num_rows = moe_tile_rows(num_tokens * top_k, num_experts)
    default = moe.choose_tile(num_rows, x.dtype)

    def launch(config: Config) -> None:
        tile = with_config(op, default, moe.TUNABLE, config)
        moe.fused_moe(x, w13, w2, topk_weights, topk_ids, "silu", out, workspace, tile)

    tried = ({name: config[name] for name in moe.TUNABLE} for config in candidates() if config["groups"] == 1)
    best = measure(tried, lambda config: _seconds_of(launch, config, seconds))
    shape = moe.tuning_shape(num_experts, intermediate, hidden)
    cache.keep(tuning_key(op, rows=num_rows, shape=shape, dtype=x.dtype, device=x.device), best)
    return best


def tune_paged_attention(
    call: "AttentionCall",
    max_query_len: int,
    cache: TuningCache,
    seconds: Callable[[Callable[[], None]], float],
) -> Measured:
    """Measure the warps and stages of attention and keep the best in the cache; as `tune_packed_linear`.

    Calls whose queries fit a tile of split keys are measured by that kernel, and longer ones by the kernel for prompts.

    Args:
        call: over cache blocks, in fp16 or bf16, and not batch-invariant: other calls are not tuned.
        max_query_len: the most queries of one of its sequences.
        cache: where the result is kept.
        seconds: how long a launch takes; what cannot be launched raises, and does not count.

    Raises:
        OptionError: the call is not tuned.
    """
    from octavo_kernels.triton import attention, split_attention
    from octavo_kernels.triton._tuned import tuning_key

    op = "paged_attention"
    tuned = call.q.dtype != torch.float32 and not call.options.batch_invariant
    _check.option("tune", "the call's dtype", call.q.dtype, tuned, "fp16 or bf16, not batch-invariant")
    own = replace(call, config={})
    splits = max_query_len <= own.split_tile(max_query_len).rows // own.group
    tile = own.split_tile(max_query_len) if splits else own.prefill_tile(max_query_len)

    def launch(config: Config) -> None:
        one = replace(call, config=config)
        if splits:
            split_attention.split_attention(one, max_query_len, one.options.workspace)
        else:
            attention.prefill(one, max_query_len, None)

    best = measure(_attention_candidates(), lambda config: _seconds_of(launch, config, seconds))
    shape = call.tuning_shape("decode" if splits else "prefill")
    cache.keep(tuning_key(op, rows=tile.rows, shape=shape, dtype=call.q.dtype, device=call.q.device), best)
    return best


def _seconds_of(
    launch: Callable[[Config], None], config: Config, seconds: Callable[[Callable[[], None]], float]
) -> float:
    """Return how long a launch takes; infinity for a tile that takes more than the device has."""
    try:
        return seconds(lambda: launch(config))
    except Exception as error:  # Triton's
        if type(error).__name__ not in ("OutOfResources", "PTXASError"):
            raise
        return float("inf")


def candidates() -> Iterator[Config]:
    """Yield the configurations that are tried."""
    for columns, groups, num_warps, num_stages in itertools.product((32, 64, 128), (1, 2, 4), (4, 8), (3, 4)):
        yield {"columns": columns, "groups": groups, "num_warps": num_warps, "num_stages": num_stages}


def _attention_candidates() -> Iterator[Config]:
    for num_warps, num_stages in itertools.product((2, 4, 8), (2, 3, 4, 5)):
        yield {"num_warps": num_warps, "num_stages": num_stages}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m octavo_kernels.tune", description="Measure tiles of products.")
    parser.add_argument("--op", choices=_OPS, default="packed_linear")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of weight_only_linear's codes")
    parser.add_argument("--experts", type=int, default=8, help="of fused_moe")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a row of fused_moe")
    parser.add_argument("--kv-heads", type=int, default=8, help="of paged_attention, as what follows")
    parser.add_argument("--num-seqs", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens of each sequence, the queries included")
    blocks = [item.value for item in WeightFormat]
    parser.add_argument("--format", choices=blocks, default="q4_0")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument(
        "--shape", type=_shape, action="append", required=True, help="of a linear: out_features x in_features"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 64, 256])
    return parser


def _shape(text: str) -> tuple[int, int]:
    try:
        out_features, in_features = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, expected two numbers as in 4096x14336") from None
    return out_features, in_features


def _zero_weight(format_: WeightFormat, out_features: int, in_features: int, device: str) -> PackedWeight:
    """Return a weight of zeros: what a launch takes does not depend on values."""
    data = torch.zeros(packed_num_bytes(format_, out_features, in_features), dtype=torch.uint8, device=device)
    return PackedWeight(data, format_, out_features, in_features)


def _zero_codes(bits: int, out_features: int, in_features: int, device: str) -> IntWeight:
    codes = torch.zeros(in_features, out_features, dtype=torch.int32, device=device)
    scales = torch.zeros(-(-in_features // 128), out_features, dtype=torch.float16, device=device)
    return int_weight_from_codes(codes, scales, bits=bits, group_size=128)


def _attention_of(
    options: argparse.Namespace, shape: tuple[int, int], max_query_len: int, dtype: torch.dtype, device: str
) -> "AttentionCall":
    """Return a call over sequences of equal lengths, each in blocks of its own."""
    from octavo_kernels.triton._attention_call import AttentionCall

    (num_heads, head_dim), num_seqs, seq_len = shape, options.num_seqs, options.seq_len
    _check.option("tune", "--seq-len", seq_len, seq_len >= max_query_len, f"at least the {max_query_len} of --rows")
    _check.grouped_heads("tune", num_heads, options.kv_heads)
    num_blocks = -(-seq_len // _BLOCK_SIZE)
    cache = torch.zeros(2, num_seqs * num_blocks, options.kv_heads, _BLOCK_SIZE, head_dim, dtype=dtype, device=device)
    q = torch.zeros(num_seqs * max_query_len, num_heads, head_dim, dtype=dtype, device=device)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * max_query_len
    lens = torch.full((num_seqs,), seq_len, dtype=torch.int32, device=device)
    table = torch.arange(num_seqs * num_blocks, dtype=torch.int32, device=device).view(num_seqs, num_blocks)
    scores = AttentionOptions(scale=head_dim**-0.5, causal=True)
    return AttentionCall(q, cache[0], cache[1], starts, lens, scores, torch.empty_like(q), None, table)


if __name__ == "__main__":
    sys.exit(main())
