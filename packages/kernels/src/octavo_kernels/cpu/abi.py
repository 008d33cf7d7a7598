"""The native library's structs, field by field as in csrc/ops.h."""

import ctypes
from enum import IntEnum

import torch

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class OpKind(IntEnum):
    """The number of each op."""

    PACK_WEIGHT = 0
    PACKED_LINEAR = 1
    PACKED_EMBEDDING = 2
    PACKED_ARGMAX = 3
    RMS_NORM = 4
    GATED = 5
    ROPE_KV_WRITE = 6
    PAGED_ATTENTION = 7
    NOISE = 8
    NOISE_AT = 9
    SAMPLE_TOKENS = 10
    APPLY_TOKEN_BITMASK = 11
    LORA_SHRINK = 12
    LORA_EXPAND = 13
    LORA_LINEAR = 14
    GROUP_ROWS = 15
    PACKED_SAMPLE = 16


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def _fields(pointers: str = "", integers: str = "", floats: str = "") -> list[tuple[str, type]]:
    """List a struct's fields: pointers first, then integers, then floats, as every struct has them."""
    kinds = ((pointers, _POINTER), (integers, _INT), (floats, _FLOAT))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Step(ctypes.Structure):
    """The sizes that a recorded program is run on."""

    _fields_ = _fields(integers="num_tokens num_seqs")


class Op(ctypes.Structure):
    """One op of a program: its number, its rows and its arguments."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("per_token", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("args", ctypes.c_void_p),
    )


class PackWeightArgs(ctypes.Structure):
    """Arguments of PACK_WEIGHT."""

    _fields_ = _fields("stored packed", "format out_features in_features")


class PackedLinearArgs(ctypes.Structure):
    """Arguments of PACKED_LINEAR."""

    _fields_ = _fields(
        "x weight grid bias out workspace", "x_stride out_stride format out_features in_features int8_activations"
    )


class PackedEmbeddingArgs(ctypes.Structure):
    """Arguments of PACKED_EMBEDDING."""

    _fields_ = _fields("weight grid token_ids out", "out_stride format out_features in_features")


class PackedArgmaxArgs(ctypes.Structure):
    """Arguments of PACKED_ARGMAX."""

    _fields_ = _fields(
        "x weight grid norms ids best workspace", "x_stride format out_features in_features int8_activations"
    )


class RmsNormArgs(ctypes.Structure):
    """Arguments of RMS_NORM."""

    _fields_ = _fields("x residual weight out", "x_stride residual_stride out_stride size", "eps offset")


class GatedArgs(ctypes.Structure):
    """Arguments of GATED."""

    _fields_ = _fields("x out", "x_stride out_stride size activation")


class RopeKvWriteArgs(ctypes.Structure):
    """Arguments of ROPE_KV_WRITE."""

    _fields_ = _fields(
        "q k v positions cos_sin k_cache v_cache slot_mapping q_norm_weight k_norm_weight k_scale v_scale",
        "q_token_stride q_head_stride k_token_stride k_head_stride v_token_stride v_head_stride "
        "k_block_stride k_cache_head_stride k_slot_stride v_block_stride v_cache_head_stride v_slot_stride "
        "k_scale_block_stride k_scale_head_stride k_scale_slot_stride "
        "v_scale_block_stride v_scale_head_stride v_scale_slot_stride "
        "num_heads num_kv_heads head_dim rot_dim block_size cache_dtype interleaved only_write known_scales",
        "eps unused",
    )


class PagedAttentionArgs(ctypes.Structure):
    """Arguments of PAGED_ATTENTION."""

    _fields_ = _fields(
        "q k_cache v_cache k_scale v_scale query_start_loc seq_lens block_table sinks alibi_slopes out lse",
        "q_token_stride q_head_stride out_token_stride out_head_stride "
        "k_block_stride k_head_stride k_slot_stride v_block_stride v_head_stride v_slot_stride block_table_stride "
        "num_seqs num_heads num_kv_heads head_dim block_size cache_dtype causal window",
        "scale soft_cap",
    )


class NoiseArgs(ctypes.Structure):
    """Arguments of NOISE."""

    _fields_ = _fields("seeds sequence_index positions out", "num_columns words")


class NoiseAtArgs(ctypes.Structure):
    """Arguments of NOISE_AT."""

    _fields_ = _fields("seeds sequence_index positions columns out")


class SampleTokensArgs(ctypes.Structure):
    """Arguments of SAMPLE_TOKENS."""

    _fields_ = _fields(
        "logits source_rows temperature top_k top_p min_p seeds sequence_index positions token_ids best",
        "logits_stride vocab_size",
    )


class PackedSampleArgs(ctypes.Structure):
    """Arguments of PACKED_SAMPLE."""

    _fields_ = (("linear", PackedLinearArgs), ("draws", SampleTokensArgs), *_fields("norms", "num_rows"))


class ApplyTokenBitmaskArgs(ctypes.Structure):
    """Arguments of APPLY_TOKEN_BITMASK."""

    _fields_ = _fields("logits bitmask rows", "logits_stride bitmask_stride vocab_size")


class LoraPart(ctypes.Structure):
    """One of the linears of LoraArgs."""

    _fields_ = _fields("a b ranks scales factors", "first_column num_columns")


class LoraArgs(ctypes.Structure):
    """Arguments of LORA_SHRINK, LORA_EXPAND and LORA_LINEAR."""

    _fields_ = _fields(
        "x out parts rows groups shrunk",
        "x_stride out_stride num_parts num_tiles tile_rows num_spans span_inputs shrunk_part_stride shrunk_span_stride "
        "max_rank in_features a_dtype b_dtype",
    )


class GroupRowsArgs(ctypes.Structure):
    """Arguments of GROUP_ROWS."""

    _fields_ = _fields("ids rows groups places", "num_groups num_tiles tile_rows bytes_of_id")
