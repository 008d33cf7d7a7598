"""The small fused kernels and those of sampling that are compiled without a GPU, in the variants that are launched."""

KERNELS = {
    "rope_kv_write": {
        "kernel": "octavo_kernels.triton.rope:_rope_write",
        "types": {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "k_cache", "v_cache", "q_weight", "k_weight"), "*bf16"),
            **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
            "cos_sin": "*fp32",
            "eps": "fp32",
        },
        "constants": {
            "HEAD_DIM": 128, "HALF": 64, "BLOCK_SIZE": 16, "BLOCK_D": 128, "BLOCK_HALF": 64, "INTERLEAVED": False,
        },
        "num_warps": 1,
    },
    "apply_token_bitmask": {
        "kernel": "octavo_kernels.triton.bitmask:_mask",
        "types": {"logits": "*fp32", "bitmask": "*i32", "rows": "*i64"},
        "constants": {"BLOCK": 4096},
        "num_warps": 4,
    },
}  # fmt: skip
