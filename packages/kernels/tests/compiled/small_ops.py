"""The small fused kernels and those of sampling that are compiled without a GPU, in the variants that are launched."""


def _norm(size, *, num_warps, residual="*bf16", out="*bf16", groups=1, largest=0.0):
    codes = out in ("*i8", "*fp8e4nv")
    absent = {**({} if residual else {"residual_ptr": None}), **({} if codes else {"scales_ptr": None})}
    return {
        "kernel": "octavo_kernels.triton.norm:_norm",
        "types": {
            **dict.fromkeys(("x_ptr", "weight_ptr"), "*bf16"),
            "residual_ptr": residual,
            "out_ptr": out,
            "scales_ptr": "*fp32",
            **dict.fromkeys(("eps", "offset"), "fp32"),
        },
        "constants": {
            **absent, "num_inner": 1, "SIZE": size, "ROWS": 1, "BLOCK": size, "GROUPS": groups, "LARGEST": largest,
            "FIXED": False,
        },
        "num_warps": num_warps,
    }  # fmt: skip


def _activation(kernel, kind, *, block, num_warps, out="*bf16", largest=0.0, gated=True, **constants):
    absent = {} if out in ("*i8", "*fp8e4nv") else {"scales_ptr": None}
    flags = {"SIZE": 14336, "KIND": kind, "GATED": gated, "ROWS": 1, "BLOCK": block, "LARGEST": largest}
    return {
        "kernel": f"octavo_kernels.triton.activation:{kernel}",
        "types": {"x_ptr": "*bf16", "out_ptr": out, "scales_ptr": "*fp32"},
        "constants": {**absent, "num_inner": 1, **flags, **constants},
        "num_warps": num_warps,
    }


def _rope(*, cache="*bf16", normed=False, interleaved=False, largest=0.0):
    """Return 32 heads of q, 16 at a time, with head_dim 128, all of it rotated."""
    absent = {
        **({} if normed else dict.fromkeys(("q_weight", "k_weight"))),
        **(dict.fromkeys(("k_scale", "v_scale")) if cache == "*bf16" else {}),
    }
    sizes = {"HEAD_DIM": 128, "HALF": 64, "BLOCK_SIZE": 16, "TOKENS": 1, "HEADS": 16, "BLOCK_D": 128}
    flags = {
        "BLOCK_HALF": 64,
        "BLOCK_REST": 1,
        "INTERLEAVED": interleaved,
        "LARGEST": largest,
        "MEASURED": cache != "*bf16",
    }
    return {
        "kernel": "octavo_kernels.triton.rope:_rope_write",
        "types": {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight", "k_weight"), "*bf16"),
            **dict.fromkeys(("k_cache", "v_cache"), cache),
            **dict.fromkeys(("positions", "slot_mapping"), "*i64"),
            **dict.fromkeys(("cos_sin", "k_scale", "v_scale"), "*fp32"),
            "eps": "fp32",
        },
        "constants": {**absent, **sizes, **flags},
        "num_warps": 4,
    }


_KEYS = ("seeds_ptr", "sequence_index_ptr", "positions_ptr")
_FILTERS = {"top_k_ptr": "*i64", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}


def _noise(*, gumbel):
    return {
        "kernel": "octavo_kernels.triton.noise:_noise",
        "types": {**dict.fromkeys(_KEYS, "*i64"), "out_ptr": "*fp32" if gumbel else "*i64"},
        "constants": {"ROWS": 1, "COLUMNS": 2048, "GUMBEL": gumbel},
        "num_warps": 4,
    }


def _sample(*, filtered):
    absent = {"source_rows": None} if filtered else dict.fromkeys(("source_rows", *_FILTERS))
    return {
        "kernel": "octavo_kernels.triton.sampling:_sample",
        "types": {
            **dict.fromkeys(("logits_ptr", "temperature_ptr", "best_ptr"), "*fp32"),
            **dict.fromkeys(("source_rows", "token_ids", *_KEYS), "*i64"),
            **_FILTERS,
        },
        "constants": {**absent, "ROWS": 1, "COLUMNS": 4096, "FILTERED": filtered},
        "num_warps": 8,
    }


_STATE = ("num_computed_tokens", "tables", "rows")


def _expand(**absent):
    """Return a step of two KV groups with blocks of 16 tokens."""
    given = {name: "*i32" for name in ("given_starts", "given_tokens", "logits_seqs") if name not in absent}
    return {
        "kernel": "octavo_kernels.triton.row_state:_expand",
        "types": {
            **dict.fromkeys(("last_tokens", "token_ids", "positions", "logits_indices", "slot_mapping"), "*i64"),
            **dict.fromkeys((*_STATE, "query_start_loc", "seq_lens", "out_tables"), "*i32"),
            **given,
        },
        "constants": {**absent, "NUM_GROUPS": 2, "BLOCK_SIZE": 16, "TILE": 256},
        "num_warps": 4,
    }


# Each kernel is compiled for both targets in one of its variants.
_HOPPER = {"targets": ["sm_90"]}

KERNELS = {
    "rms_norm": _norm(4096, num_warps=8, residual=None) | _HOPPER,
    "add_rms_norm": _norm(8192, num_warps=16),
    "rms_norm of the longest rows": _norm(32768, num_warps=16) | _HOPPER,
    "add_rms_norm_quant to fp8 per row": _norm(4096, num_warps=8, out="*fp8e4nv", largest=448.0),
    "add_rms_norm_quant to int8 per group": _norm(4096, num_warps=8, out="*i8", groups=32, largest=127.0),
    "silu_and_mul": _activation("_activate", "silu", block=1024, num_warps=4, GROUPS=1, FIXED=False),
    "gelu_and_mul_quant to fp8 per group": _activation(
        "_activate", "gelu", block=1024, num_warps=4, out="*fp8e4nv", largest=448.0, GROUPS=8, FIXED=False
    ),
    "gelu_quant to int8 per row": _activation(
        "_activate_row", "gelu_tanh", block=4096, num_warps=8, out="*i8", largest=127.0, gated=False
    ),
    "rope_kv_write": _rope(),
    "rope_kv_write of neighbours with a norm": _rope(normed=True, interleaved=True) | _HOPPER,
    "rope_kv_write_quant to fp8": _rope(cache="*fp8e4nv", normed=True, largest=448.0),
    "rope_kv_write_quant to int8": _rope(cache="*i8", interleaved=True, largest=127.0) | _HOPPER,
    "philox": _noise(gumbel=False) | _HOPPER,
    "gumbel_noise": _noise(gumbel=True),
    "gumbel_noise_at": {
        "kernel": "octavo_kernels.triton.noise:_noise_at",
        "types": {**dict.fromkeys((*_KEYS, "columns_ptr"), "*i64"), "out_ptr": "*fp32"},
        "constants": {"BLOCK": 256},
        "num_warps": 4,
    },
    "sample_tokens": _sample(filtered=False) | _HOPPER,
    "sample_tokens with filters": _sample(filtered=True),
    "apply_filters": {
        "kernel": "octavo_kernels.triton.filters:_filter",
        "types": {**dict.fromkeys(("logits_ptr", "temperature_ptr"), "*fp32"), **_FILTERS},
        "constants": {"ROWS": 1, "COLUMNS": 4096},
        "num_warps": 4,
    },
    "apply_penalties": {
        "kernel": "octavo_kernels.triton.penalties:_penalise",
        "types": {
            **dict.fromkeys(("logits_ptr", "repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp32"),
            **dict.fromkeys(("counts_ptr", "bitmask_ptr"), "*i32"),
            **dict.fromkeys(("rows_ptr", "table_rows_ptr"), "*i64"),
        },
        "constants": {"BLOCK": 2048},
        "num_warps": 4,
    },
    "token_logprobs": {
        "kernel": "octavo_kernels.triton.logprobs:_logprobs",
        "types": {
            **dict.fromkeys(("logits_ptr", "logprobs_ptr", "top_logprobs_ptr"), "*fp32"),
            **dict.fromkeys(("token_ids_ptr", "ranks_ptr", "top_ids_ptr"), "*i64"),
        },
        "constants": {"ROWS": 1, "COLUMNS": 4096},
        "num_warps": 8,
    },
    "rejection_sample": {
        "kernel": "octavo_kernels.triton.speculation:_judge",
        "types": {
            **dict.fromkeys(("target_ptr", "guess_ptr", "temperature_ptr"), "*fp32"),
            **dict.fromkeys(("drafts_ptr", "token_ids_ptr", *_KEYS), "*i64"),
            **dict.fromkeys(("starts_ptr", "num_accepted_ptr"), "*i32"),
        },
        "constants": {"ROWS": 1, "COLUMNS": 4096},
        "num_warps": 8,
    },
    "apply_token_bitmask": {
        "kernel": "octavo_kernels.triton.bitmask:_mask",
        "types": {"logits": "*fp32", "bitmask": "*i32", "rows": "*i64"},
        "constants": {"BLOCK": 4096},
        "num_warps": 4,
    },
    "update_rows": {
        "kernel": "octavo_kernels.triton.row_state:_update",
        "types": {
            **dict.fromkeys(("last_tokens", "new_last_tokens"), "*i64"),
            **dict.fromkeys(_STATE, "*i32"),
            **dict.fromkeys(("new_num_computed_tokens", "runs", "run_starts", "block_ids"), "*i32"),
        },
        "constants": {"TILE": 256},
        "num_warps": 4,
    },
    "expand_rows for a decode step": _expand(given_starts=None, given_tokens=None, logits_seqs=None) | _HOPPER,
    "expand_rows": _expand(),
    "advance_rows": {
        "kernel": "octavo_kernels.triton.row_state:_advance",
        "types": {
            **dict.fromkeys(("last_tokens", "token_ids"), "*i64"),
            **dict.fromkeys(("num_computed_tokens", "rows", "seq_lens", "drawing_rows"), "*i32"),
        },
        "constants": {"TILE": 256},
        "num_warps": 4,
    },
}
