"""A program that measures launch configurations on this machine's GPU, and keeps the best.

    python -m octavo_kernels.tune --format q4_k --shape 4096x4096 --shape 14336x4096 --rows 1 32 64 256

It tries tiles of `packed_linear` for each shape, [out_features]x[in_features], and number of rows, and writes the
fastest to the user's tuning cache, where later processes find it (see `octavo_kernels.tuning`). `--op
weight_only_linear` tries those of products by int4 or int8 codes (`--bits`), in groups of 128 inputs.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from octavo_kernels.int_weight import IntWeight, int_weight_from_codes
from octavo_kernels.matmul import packed_linear_workspace
from octavo_kernels.packed_weight import PackedWeight, WeightFormat, packed_num_bytes
from octavo_kernels.tuning import Config, Measured, TuningCache, measure, user_file
from octavo_kernels.weight_only import weight_only_workspace

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
    for (out_features, in_features), num_tokens in itertools.product(options.shape, options.rows):
        x = torch.randn(num_tokens, in_features, device="cuda").to(dtype)
        if options.op == "packed_linear":
            packed = _zero_weight(WeightFormat(options.format), out_features, in_features)
            best = tune_packed_linear(x, packed, cache, seconds_of)
        else:
            codes = _zero_codes(options.bits, out_features, in_features)
            best = tune_weight_only_linear(x, codes, cache, seconds_of)
        print(f"{num_tokens} rows, {out_features}x{in_features}: {best.seconds * 1e6:.1f} us, {dict(best.config)}")
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m octavo_kernels.tune", description="Measure tiles of products.")
    parser.add_argument("--op", choices=("packed_linear", "weight_only_linear"), default="packed_linear")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of weight_only_linear's codes")
    blocks = [item.value for item in WeightFormat]
    parser.add_argument("--format", choices=blocks, default="q4_0")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--shape", type=_shape, action="append", required=True, help="out_features x in_features")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 64, 256])
    return parser


def _shape(text: str) -> tuple[int, int]:
    try:
        out_features, in_features = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, expected two numbers as in 4096x14336") from None
    return out_features, in_features


def _zero_weight(format_: WeightFormat, out_features: int, in_features: int) -> PackedWeight:
    """Return a weight of zeros: what a launch takes does not depend on values."""
    data = torch.zeros(packed_num_bytes(format_, out_features, in_features), dtype=torch.uint8, device="cuda")
    return PackedWeight(data, format_, out_features, in_features)


def _zero_codes(bits: int, out_features: int, in_features: int) -> IntWeight:
    codes = torch.zeros(in_features, out_features, dtype=torch.int32, device="cuda")
    scales = torch.zeros(-(-in_features // 128), out_features, dtype=torch.float16, device="cuda")
    return int_weight_from_codes(codes, scales, bits=bits, group_size=128)


if __name__ == "__main__":
    sys.exit(main())
