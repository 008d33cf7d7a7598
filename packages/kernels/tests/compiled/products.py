"""The kernels of matrix products that are compiled without a GPU, in the variants that are launched."""

from typing import Any


def _weight_only(tile, *, bits=4, group=128, absent=("minimums_ptr", "bias_ptr"), dtype="bf16", **gates):
    """Return a product by integer weights; tile is rows, outputs, warps and stages. Few rows take 16 inputs at once."""
    block_m, block_n, num_warps, num_stages = tile
    pointers = {"words_ptr": "*i32", "zeros_ptr": "*i16", "out_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    halves = dict.fromkeys(("scales_ptr", "minimums_ptr", "bias_ptr"), "*fp16")
    block = 512 // bits
    step = min(group, block)
    inputs = 16 if block_m <= 32 and dtype != "fp32" else step
    sizes = {"BITS": bits, "BLOCK_INPUTS": block, "STEP": step, "INPUTS": inputs, "ZERO_POINT": 8}
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


def _grouped(kernel, tile, **gates):
    """Return a product grouped by expert or adapter."""
    block_m, block_n, num_warps, num_stages = tile
    indices = dict.fromkeys(("rows_ptr", "groups_ptr", "ranks_ptr"), "*i32")
    floats = dict.fromkeys(("factors_ptr", "scales_ptr", "shrunk_ptr"), "*fp32")
    halves = dict.fromkeys(("x_ptr", "w_ptr", "a_ptr", "b_ptr", "out_ptr"), "*bf16")
    own = {"moe:_gate_up": {"TANH": False}, "lora:_expand": {"NUM_SPANS": 4}}
    names = {
        "moe:_gate_up": ("x_ptr", "w_ptr", "out_ptr", "rows_ptr", "groups_ptr"),
        "moe:_down": ("x_ptr", "w_ptr", "factors_ptr", "out_ptr", "rows_ptr", "groups_ptr"),
        "lora:_shrink": ("x_ptr", "a_ptr", "out_ptr", "rows_ptr", "groups_ptr", "ranks_ptr"),
        "lora:_expand": ("shrunk_ptr", "b_ptr", "out_ptr", "rows_ptr", "groups_ptr", "ranks_ptr", "scales_ptr"),
    }
    aligned = {"lora:_shrink": ["in_features", "span_inputs"], "lora:_expand": ["max_rank"]}
    types = {name: (indices | floats | halves)[name] for name in names[kernel]}
    if kernel == "lora:_shrink":
        types["out_ptr"] = "*fp32"
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64}
    return {
        "kernel": f"octavo_kernels.triton.{kernel}",
        "types": types,
        "constants": {**own.get(kernel, {}), **sizes, "WIDE_DOT": False, "PRECISION": "ieee"},
        "aligned": aligned.get(kernel, ["hidden", "intermediate"]),
        "num_warps": num_warps,
        "num_stages": num_stages,
        **({"targets": ["sm_90"]} | gates),
    }


_GGUF = {"group": 32, "absent": ("zeros_ptr", "bias_ptr")}

KERNELS: dict[str, Any] = {
    "W4A16, 16 rows": _weight_only((16, 64, 4, 4), wgmma=False, targets=["sm_90", "gfx942"]),
    "W4A16, many rows": _weight_only((128, 64, 8, 3), dtype="fp16", wgmma=True),
    "W4A16 in groups of 32, many rows": _weight_only((64, 64, 8, 3), wgmma=True, **_GGUF),
    "W8A16, many rows": _weight_only((128, 64, 8, 3), bits=8, wgmma=True),
    "sums of spans": {
        "kernel": "octavo_kernels.triton._tiles:_sum_spans",
        "types": {"partial": "*fp32", "out": "*bf16"},
        "constants": {"bias": None, "NUM_SPANS": 4, "BLOCK": 256},
        "num_warps": 4,
    },
    "quantize_rows to fp8": {
        "kernel": "octavo_kernels.triton.quantize:_quantize",
        "types": {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scales_ptr": "*fp32"},
        "constants": {"LARGEST": 448.0, "BLOCK": 4096},
        "num_warps": 4,
        "targets": ["sm_90"],
    },
    "FP8 by blocks, many rows": _scaled((128, 64, 8, 4), "fp8e4nv", blocks=True, wgmma=True),
    "W8A8, many rows": _scaled((128, 128, 8, 3), "i8", wgmma=True),
    "MoE gate and up, many rows": _grouped("moe:_gate_up", (128, 64, 8, 3), wgmma=True),
    "MoE down, many rows": _grouped("moe:_down", (128, 64, 8, 3), wgmma=True),
    "LoRA shrink": _grouped("lora:_shrink", (16, 16, 4, 3), wgmma=False),
    "LoRA expand": _grouped("lora:_expand", (16, 64, 4, 2), wgmma=False),
    "group_rows, places": {
        "kernel": "octavo_kernels.triton.row_groups:_place",
        "types": dict.fromkeys(("counts", "starts", "tile_groups"), "*i32"),
        "constants": {"GROUPS": 256, "TILE_ROWS": 64, "AT_ONCE": 32},
        "num_warps": 4,
    },
    "group_rows, rows": {
        "kernel": "octavo_kernels.triton.row_groups:_write",
        "types": dict.fromkeys(("ids", "counts", "starts", "sorted_rows"), "*i32"),
        "constants": {"CHUNK": 128},
        "num_warps": 4,
    },
}
