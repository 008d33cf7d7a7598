"""The kernels of attention and of the cache that are compiled without a GPU, in the variants that are launched."""

_OPTIONAL = ("lse_ptr", "sinks_ptr", "slopes_ptr", "k_scale_ptr", "v_scale_ptr")
_PLAN = {**dict.fromkeys(("query_start_loc", "seq_lens", "plan"), "*i32"), "parts": "*fp32", "sums": "*fp32"}
_TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(_OPTIONAL, "*fp32"),
    **dict.fromkeys(("query_start_loc", "key_lens", "block_table", "plan"), "*i32"),
    **dict.fromkeys(("factor", "soft_cap"), "fp32"),
}
# Hopper's tiles have no room on CDNA3, which gets its own.
_HOPPER, _CDNA3 = {"targets": ["sm_90"]}, {"targets": ["gfx942"], "num_stages": 2, "wgmma": None}


def _attention(rows, keys, num_warps, *, split, chunked=True, rich=False, head_dim=128, cache="*bf16"):
    """Return a launch for groups of four heads, with every option or with none but the scales of an 8-bit cache."""
    sizes = {"GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_SIZE": 16, "BLOCK_D": head_dim}
    tile = {"BLOCK_M": rows, "BLOCK_Q": rows // 4, "BLOCK_N": keys, "ALIKE": True, "CHUNKED": chunked}
    flags = {"CAUSAL": True, "WINDOWED": rich, "CAPPED": rich, "LATE_SCALE": rich, "WIDE_DOT": False}
    absent = () if rich else [name for name in _OPTIONAL if cache == "*bf16" or "scale" not in name]
    types = _TYPES | {"k_ptr": cache, "v_ptr": cache}
    if split:
        absent = [name for name in absent if name not in ("lse_ptr", "sinks_ptr")]
        for name in ("out_ptr", "lse_ptr", "sinks_ptr"):
            del types[name]
    return {
        "kernel": f"octavo_kernels.triton.{'split_attention:_split' if split else 'attention:_attend'}",
        "types": types | ({"parts": "*fp32", "sums": "*fp32"} if split else {}),
        "constants": dict.fromkeys(absent) | sizes | tile | flags | ({} if split else {"PAGED": True}),
        "num_warps": num_warps,
        "num_stages": 5 if split else 3,
        "wgmma": rows >= 64,
        **_HOPPER,
    }


KERNELS = {
    "decode": _attention(64, 64, 4, split=True),
    "decode with all options": _attention(64, 32, 8, split=True, rich=True),
    "decode of fp8": _attention(64, 64, 4, split=True, cache="*fp8e4nv"),
    "decode with the lowest tile": _attention(16, 64, 4, split=True, chunked=False),
    "decode as shipped for Hopper": _attention(64, 64, 4, split=True) | {"num_stages": 3},
    "decode on CDNA3": _attention(64, 64, 4, split=True) | _CDNA3,
    "prefill": _attention(128, 64, 8, split=False),
    "prefill with all options": _attention(64, 32, 8, split=False, rich=True),
    "prefill with head_dim 256": _attention(64, 32, 8, split=False, head_dim=256),
    "prefill on CDNA3": _attention(64, 64, 4, split=False) | _CDNA3,
    "plan of a split": {
        "kernel": "octavo_kernels.triton.split_attention:_plan",
        "types": {name: _PLAN[name] for name in ("query_start_loc", "seq_lens", "plan")},
        "constants": {"WINDOWED": True, "CHUNKED": True, "BLOCK": 1024},
        "num_warps": 4,
    },
    "join of a split": {
        "kernel": "octavo_kernels.triton.split_attention:_join_parts",
        "types": {name: _PLAN[name] for name in _PLAN if name != "seq_lens"}
        | {"out_ptr": "*bf16", "lse_ptr": "*fp32", "sinks_ptr": "*fp32"},
        "constants": {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128, "ROWS": 1, "AHEAD": 16},
        "num_warps": 1,
        **_HOPPER,
    },
    "mla_decode": {
        "kernel": "octavo_kernels.triton.mla:_attend",
        "types": {
            **dict.fromkeys(("q_ptr", "pe_ptr", "ckv_cache", "out_ptr"), "*bf16"),
            **dict.fromkeys(("query_start_loc", "seq_lens", "block_table"), "*i32"),
            "lse_ptr": "*fp32",
            "factor": "fp32",
        },
        "constants": {
            "LATENT": 512,
            "ROPE": 64,
            "BLOCK_SIZE": 16,
            "BLOCK_H": 16,
            "BLOCK_N": 32,
            "BLOCK_L": 512,
            "BLOCK_R": 64,
            "WIDE_DOT": False,
        },
        "num_warps": 4,
        "num_stages": 2,
        **_HOPPER,
    },
    "index of shared prefixes": {
        "kernel": "octavo_kernels.triton.shared_attention:_index",
        "types": dict.fromkeys(
            (
                *("query_start_loc", "seq_lens", "block_table", "group_start_loc", "lengths"),
                *("group_queries", "suffix_lens", "prefix_table", "suffix_table"),
            ),
            "*i32",
        ),
        "constants": {"BLOCK_SIZE": 16, "BLOCK": 256},
        "num_warps": 4,
        **_HOPPER,
    },
    "merge_states": {
        "kernel": "octavo_kernels.triton.merge:_merge",
        "types": {
            **dict.fromkeys(("a_ptr", "b_ptr", "lse_a_ptr", "lse_b_ptr", "lse_ptr"), "*fp32"),
            "out_ptr": "*bf16",
            "end": "*i32",
        },
        "constants": {
            "HEAD_DIM": 128,
            "BLOCK_D": 128,
            "BLOCK_R": 16,
            **dict.fromkeys(("a_stride_d", "b_stride_d", "out_stride_d"), 1),
        },
        "num_warps": 4,
        **_HOPPER,
    },
    "copy_blocks": {
        "kernel": "octavo_kernels.triton.cache_ops:_copy",
        "types": {"to_ptr": "*i16", "from_ptr": "*i16", "to_ids": "*i64"},
        "constants": {"from_ids": None, "BLOCK": 1024},
        "num_warps": 4,
    },
    "gather_kv": {
        "kernel": "octavo_kernels.triton.cache_ops:_gather",
        "types": {
            "cache": "*bf16",
            "result": "*bf16",
            "block_table": "*i32",
            "ends": "*i64",
            "seq_lens": "*i32",
        },
        "constants": {"stride_d": 1, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "BLOCK_O": 16, "BLOCK_D": 128},
        "num_warps": 4,
        **_HOPPER,
    },
    "write_kv": {
        "kernel": "octavo_kernels.triton.cache_ops:_write",
        "types": {**dict.fromkeys(("k_ptr", "v_ptr", "k_cache", "v_cache"), "*bf16"), "slot_mapping": "*i64"},
        "constants": {"HEAD_DIM": 128, "BLOCK_SIZE": 16, "BLOCK_D": 128},
        "num_warps": 1,
    },
}
