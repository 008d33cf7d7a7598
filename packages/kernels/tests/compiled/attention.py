"""The kernels of attention and of the cache that are compiled without a GPU, in the variants that are launched."""

_OPTIONAL = ("lse_ptr", "sinks_ptr", "slopes_ptr", "k_scale_ptr", "v_scale_ptr")
_TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(_OPTIONAL, "*fp32"),
    **dict.fromkeys(("query_start_loc", "key_lens", "block_table"), "*i32"),
    **dict.fromkeys(("factor", "soft_cap"), "fp32"),
}


def _attend(block_m, num_warps, *, rich):
    """Return head_dim 128 with groups of four heads, with every option or with none."""
    sizes = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "BLOCK_M": block_m, "BLOCK_Q": block_m // 4, "BLOCK_N": 64}
    flags = {"PAGED": True, "CAUSAL": True, "WINDOWED": rich, "CAPPED": rich, "LATE_SCALE": rich, "WIDE_DOT": False}
    absent = {} if rich else dict.fromkeys(_OPTIONAL)
    return {
        "kernel": "octavo_kernels.triton.attention:_attend",
        "types": _TYPES,
        "constants": {**absent, **sizes, "BLOCK_D": 128, **flags},
        "num_warps": num_warps,
        "num_stages": 2,
    }


KERNELS = {
    "decode": _attend(16, 4, rich=False) | {"wgmma": False},
    "decode with all options": _attend(16, 4, rich=True),
    "prefill": _attend(128, 8, rich=False) | {"wgmma": True, "targets": ["sm_90"]},
    # Tiles of 128 rows are Hopper's: gfx942 has no registers for all of this, and is slower for it, not wrong.
    "prefill with all options": _attend(128, 8, rich=True) | {"wgmma": True, "may_spill": ["gfx942"]},
    "write_kv": {
        "kernel": "octavo_kernels.triton.cache_ops:_write",
        "types": {**dict.fromkeys(("k_ptr", "v_ptr", "k_cache", "v_cache"), "*bf16"), "slot_mapping": "*i64"},
        "constants": {"HEAD_DIM": 128, "BLOCK_SIZE": 16, "BLOCK_D": 128},
        "num_warps": 1,
    },
}
