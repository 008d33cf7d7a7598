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


def _packed(tile, kind, *, dtype="bf16", rounded=False, bias=None, **gates):
    """Return a product by a packed weight of a kind; tile is rows, outputs, groups at once, warps and stages."""
    block_m, block_n, unrolled, num_warps, num_stages = tile
    views = {"words_ptr": "*i32", "halves_ptr": "*fp16", "bytes_ptr": "*i8"}
    dense = kind["INPUTS"] == 0
    absent = {} if bias else {"bias_ptr": None}
    if dense:
        views = {"words_ptr": f"*{dtype}"}
        absent |= dict.fromkeys(("halves_ptr", "bytes_ptr"))
    pointers = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | ({"bias_ptr": "*fp32"} if bias else {})
    precision = "tf32x3" if dtype == "fp32" else "ieee"
    return {
        "kernel": "octavo_kernels.triton.matmul:_product",
        "types": views | pointers,
        "constants": absent | kind | {
            "ROUNDED": rounded, "UNROLLED": unrolled, "BLOCK_M": block_m, "BLOCK_N": block_n, "WIDE_DOT": False,
            "PRECISION": precision,
        },
        "aligned": ["in_features", "panel_words"],
        "num_warps": num_warps,
        "num_stages": num_stages,
        **({"targets": ["sm_90"]} | gates),
    }  # fmt: skip


def _packed_rows(kind):
    return {
        "kernel": "octavo_kernels.triton.matmul:_rows",
        "types": {
            "words_ptr": "*i32", "halves_ptr": "*fp16", "bytes_ptr": "*i8", "ids_ptr": "*i64", "out_ptr": "*fp32",
        },
        "constants": kind | {"BLOCK_N": 1},
        "aligned": ["in_features", "panel_words"],
        "num_warps": 1,
    }  # fmt: skip


def _kind(inputs, num_groups, scales, low, high, zero, places, *, minimum=False, nibbles=False, leveled=False):
    """Return a packed format as the kernels' constants; places are those of scales, codes, groups and blocks."""
    sizes = dict(zip(("SCALES_AT", "CODES_AT", "GROUP_WORDS", "BLOCK_WORDS"), places, strict=True))
    return {
        "INPUTS": inputs, "NUM_GROUPS": num_groups, "SCALES": scales, "LOW": low, "HIGH": high, "ZERO": zero,
        "MINIMUM": minimum, "NIBBLES": nibbles, "LEVELED": leveled, **sizes,
    }  # fmt: skip


# test_compile checks that these are what a launch passes.
PACKED = {
    "q4_0": _kind(32, 1, 0, 4, 0, 8, (16, 16, 128, 144)),
    "q8_0": _kind(32, 1, 0, 8, 0, 128, (16, 16, 256, 272)),
    "q2_k": _kind(16, 8, 2, 2, 0, 0, (32, 160, 64, 672), minimum=True, nibbles=True),
    "q4_k": _kind(32, 8, 1, 4, 0, 0, (32, 160, 128, 1184), minimum=True),
    "q6_k": _kind(16, 8, 2, 4, 2, 32, (16, 144, 192, 1680)),
    "iq4_xs": _kind(32, 8, 1, 4, 0, 128, (16, 80, 128, 1104), leveled=True),
    "bf16": _kind(0, 1, 0, 0, 0, 0, (0, 0, 0, 0)),
}
_GGUF = {"group": 32, "absent": ("zeros_ptr", "bias_ptr")}

KERNELS: dict[str, Any] = {
    "W4A16, 16 rows": _weight_only((16, 64, 4, 4), wgmma=False, targets=["sm_90", "gfx942"]),
    "W4A16, many rows": _weight_only((128, 64, 8, 3), dtype="fp16", wgmma=True),
    "W4A16 in groups of 32, many rows": _weight_only((64, 64, 8, 3), wgmma=True, **_GGUF),
    "W8A16, many rows": _weight_only((128, 64, 8, 3), bits=8, wgmma=True),
    "packed q4_0, 16 rows": _packed((16, 64, 4, 4, 4), PACKED["q4_0"], wgmma=False, targets=["sm_90", "gfx942"]),
    "packed q8_0, 64 rows": _packed((64, 64, 1, 4, 3), PACKED["q8_0"], dtype="fp16", bias=True, wgmma=True),
    "packed q4_0, many rows": _packed((128, 64, 1, 8, 3), PACKED["q4_0"], wgmma=True),
    "packed q2_k, many rows": _packed((128, 64, 1, 8, 3), PACKED["q2_k"], wgmma=True),
    "packed iq4_xs, 16 rows of fp32": _packed((16, 32, 1, 4, 3), PACKED["iq4_xs"], dtype="fp32", wgmma=False),
    "packed q4_k by rounded rows": _packed((128, 64, 1, 8, 3), PACKED["q4_k"], rounded=True, wgmma=True),
    "packed bf16, many rows": _packed((128, 64, 1, 8, 3), PACKED["bf16"], wgmma=True),
    "rows of packed q6_k": _packed_rows(PACKED["q6_k"]),
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
    "MoE gate and up as shipped for Hopper, few rows": _grouped("moe:_gate_up", (16, 128, 4, 4), wgmma=False),
    "MoE down as shipped for Hopper, few rows": _grouped("moe:_down", (16, 128, 4, 4), wgmma=False),
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
