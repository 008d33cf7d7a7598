"""A program that measures launch configurations on this machine's GPU, and keeps the best.

    python -m octavo_kernels.tune --format q4_k --shape 4096x4096 --shape 14336x4096 --rows 1 32 64 256

It tries tiles of `packed_linear` for each shape, [out_features]x[in_features], and number of rows, and writes the
fastest to the user's tuning cache, where later processes find it (see `octavo_kernels.tuning`).
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from octavo_kernels.matmul import packed_linear_workspace
from octavo_kernels.packed_weight import PackedWeight, WeightFormat, packed_num_bytes
from octavo_kernels.tuning import Config, Measured, TuningCache, measure, user_file

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
        weight = _zero_weight(WeightFormat(options.format), out_features, in_features)
        x = torch.randn(num_tokens, in_features, device="cuda").to(dtype)
        best = tune_packed_linear(x, weight, cache, seconds_of)
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

    def seconds_of(config: Config) -> float:
        tile = matmul.tile_from(default, config)
        try:
            return seconds(lambda: matmul.packed_linear(x, weight, None, False, out, workspace, tile))
        except Exception as error:  # Triton's, of a tile that takes more than the device has
            if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                raise
            return float("inf")

    best = measure(candidates(), seconds_of)
    cache.keep(matmul.tuning_key(x, weight), best)
    return best


def candidates() -> Iterator[Config]:
    """Yield the configurations that are tried."""
    for columns, groups, num_warps, num_stages in itertools.product((32, 64, 128), (1, 2, 4), (4, 8), (3, 4)):
        yield {"columns": columns, "groups": groups, "num_warps": num_warps, "num_stages": num_stages}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m octavo_kernels.tune", description="Measure tiles of packed_linear."
    )
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


if __name__ == "__main__":
    sys.exit(main())
