"""The kernels of matrix products that are compiled without a GPU, in the variants that are launched."""

from typing import Any


def _weight_only(tile, *, bits=4, group=128, absent=("minimums_ptr", "bias_ptr"), dtype="bf16", **gates):
    """Return a product by integer weights; tile is rows, outputs, warps and stages."""
    block_m, block_n, num_warps, num_stages = tile
    pointers = {"words_ptr": "*i32", "zeros_ptr": "*i16", "out_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    halves = dict.fromkeys(("scales_ptr", "minimums_ptr", "bias_ptr"), "*fp16")
    block = 512 // bits
    sizes = {"BITS": bits, "BLOCK_INPUTS": block, "STEP": min(group, block), "ZERO_POINT": 8}
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "WIDE_DOT": False}
    precision = "tf32x3" if dtype == "fp32" else "ieee"
    return {
        "kernel": "octavo_kernels.triton.weight_only:_product",
        "types": {name: kind for name, kind in (pointers | halves).items() if name not in absent},
        "constants": {**dict.fromkeys(absent), **sizes, **tiles, "PRECISION": precision},
        "aligned": ["in_features"],
        "num_warps": num_warps,
        "num_stages": num_stages,
        **({"targets": ["sm_90"]} | gates),
    }


def _scaled(tile, dtype, *, blocks=False, **gates):
    """Return a product of 8-bit codes, with scales for rows and outputs, or for groups and blocks of 128."""
    block_m, block_n, num_warps, num_stages = tile
    return {
        "kernel": "octavo_kernels.triton.scaled_linear:_product",
        "types": {
            **dict.fromkeys(("x_ptr", "weight_ptr"), f"*{dtype}"),
            **dict.fromkeys(("x_scale_ptr", "weight_scale_ptr"), "*fp32"),
            "out_ptr": "*bf16",
        },
        "constants": {
            "bias_ptr": None, "GROUPED": blocks, "SCALE_OUTPUTS": 128 if blocks else 1, "BLOCK_K": 128,
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        },
        "aligned": ["in_features"],
        "num_warps": num_warps,
        "num_stages": num_stages,
        **({"targets": ["sm_90"]} | gates),
    }  # fmt: skip


_GGUF = {"group": 32, "absent": ("zeros_ptr", "bias_ptr")}

KERNELS: dict[str, Any] = {
    "W4A16, 16 rows": _weight_only((16, 64, 4, 4), wgmma=False, targets=["sm_90", "gfx942"]),
    "W4A16, many rows": _weight_only((128, 64, 8, 3), dtype="fp16", wgmma=True),
    "W4A16 in groups of 32, many rows": _weight_only((64, 64, 8, 3), wgmma=True, **_GGUF),
    "W4A32": _weight_only((16, 32, 4, 3), dtype="fp32", wgmma=False),
    "W8A16, 16 rows": _weight_only((16, 64, 4, 4), bits=8, wgmma=False),
    "sums of spans": {
        "kernel": "octavo_kernels.triton._tiles:_sum_spans",
        "types": {"partial": "*fp32", "out": "*bf16"},
        "constants": {"bias": None, "NUM_SPANS": 4, "BLOCK": 256},
        "num_warps": 4,
    },
    "quantize_rows to fp8": {
        "kernel": "octavo_kernels.triton.quantize:_quantize",
        "types": {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scales_ptr": "*fp32"},
        "constants": {"LIMIT": 448.0, "WHOLE": False, "BLOCK": 4096},
        "num_warps": 4,
        "targets": ["sm_90"],
    },
    "FP8, 16 rows": _scaled((16, 64, 4, 4), "fp8e4nv", wgmma=False),
    "FP8 by blocks, many rows": _scaled((128, 64, 8, 4), "fp8e4nv", blocks=True, wgmma=True),
    "W8A8, many rows": _scaled((128, 128, 8, 3), "i8", wgmma=True),
}
