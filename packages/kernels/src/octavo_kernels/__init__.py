"""Paged attention and the kernels around it, on plain torch tensors: CPU, Triton, and a plain reference."""

from octavo_kernels._dispatch import Backend, Fallback, available_backends, choose, fallbacks
from octavo_kernels._split_workspace import attention_workspace
from octavo_kernels.activation import (
    gelu,
    gelu_and_mul,
    gelu_and_mul_quant,
    gelu_quant,
    silu_and_mul,
    silu_and_mul_quant,
)
from octavo_kernels.attention import paged_attention, varlen_attention
from octavo_kernels.bitmask import apply_token_bitmask
from octavo_kernels.cache_ops import copy_blocks, gather_kv, swap_blocks, write_kv
from octavo_kernels.cpu.load import isa as cpu_isa
from octavo_kernels.errors import (
    BackendFallbackWarning,
    BackendUnavailable,
    DeviceError,
    DtypeError,
    KernelError,
    NotRecordable,
    OptionError,
    ShapeError,
)
from octavo_kernels.filters import apply_filters
from octavo_kernels.grouped import grouped_argmax, grouped_linear
from octavo_kernels.grouped_packing import pack_grouped, unpack_grouped
from octavo_kernels.grouped_weight import Finish, GroupedCodes, GroupedWeight, NestedScales
from octavo_kernels.host_memory import host_empty
from octavo_kernels.int_weight import (
    IntWeight,
    int_weight_from_awq,
    int_weight_from_codes,
    int_weight_from_gptq,
    int_weight_from_packed,
    int_weight_values,
)
from octavo_kernels.logprobs import token_logprobs
from octavo_kernels.lora import LoraPart, lora_expand, lora_linear, lora_shrink, lora_spans
from octavo_kernels.matmul import (
    pack_weight,
    packed_argmax,
    packed_embedding,
    packed_linear,
    packed_linear_workspace,
    unpack_weight,
    weight_norms,
)
from octavo_kernels.merge import merge_states
from octavo_kernels.mla import mla_decode
from octavo_kernels.moe import fused_moe, moe_workspace
from octavo_kernels.noise import gumbel_noise, gumbel_noise_at, philox
from octavo_kernels.norm import add_rms_norm, add_rms_norm_quant, rms_norm, rms_norm_quant
from octavo_kernels.packed_sample import packed_sample
from octavo_kernels.packed_scales import has_finite_scales
from octavo_kernels.packed_weight import PackedWeight, WeightFormat, packed_num_bytes
from octavo_kernels.penalties import apply_penalties
from octavo_kernels.quantize import quantize_rows
from octavo_kernels.recording import Program, Recording, empty_result
from octavo_kernels.rope import rope_kv_write, rope_kv_write_quant
from octavo_kernels.row_groups import RowGroups, group_rows, group_rows_workspace, num_row_tiles
from octavo_kernels.row_state import StepTensors, advance_rows, expand_rows, update_rows
from octavo_kernels.sampling import sample_tokens
from octavo_kernels.scaled_linear import scaled_linear, scaled_workspace
from octavo_kernels.shared_attention import SharedPrefixes, shared_prefix_attention, shared_prefix_workspace
from octavo_kernels.speculation import rejection_sample
from octavo_kernels.threads import native_threads, num_native_threads
from octavo_kernels.weight_only import weight_only_linear, weight_only_workspace

__all__ = [
    "Backend",
    "BackendFallbackWarning",
    "BackendUnavailable",
    "DeviceError",
    "DtypeError",
    "Fallback",
    "Finish",
    "GroupedCodes",
    "GroupedWeight",
    "IntWeight",
    "KernelError",
    "LoraPart",
    "NestedScales",
    "NotRecordable",
    "OptionError",
    "PackedWeight",
    "Program",
    "Recording",
    "RowGroups",
    "ShapeError",
    "SharedPrefixes",
    "StepTensors",
    "WeightFormat",
    "add_rms_norm",
    "add_rms_norm_quant",
    "advance_rows",
    "apply_filters",
    "apply_penalties",
    "apply_token_bitmask",
    "attention_workspace",
    "available_backends",
    "choose",
    "copy_blocks",
    "cpu_isa",
    "empty_result",
    "expand_rows",
    "fallbacks",
    "fused_moe",
    "gather_kv",
    "gelu",
    "gelu_and_mul",
    "gelu_and_mul_quant",
    "gelu_quant",
    "group_rows",
    "group_rows_workspace",
    "grouped_argmax",
    "grouped_linear",
    "gumbel_noise",
    "gumbel_noise_at",
    "has_finite_scales",
    "host_empty",
    "int_weight_from_awq",
    "int_weight_from_codes",
    "int_weight_from_gptq",
    "int_weight_from_packed",
    "int_weight_values",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "lora_spans",
    "merge_states",
    "mla_decode",
    "moe_workspace",
    "native_threads",
    "num_native_threads",
    "num_row_tiles",
    "pack_grouped",
    "pack_weight",
    "packed_argmax",
    "packed_embedding",
    "packed_linear",
    "packed_linear_workspace",
    "packed_num_bytes",
    "packed_sample",
    "paged_attention",
    "philox",
    "quantize_rows",
    "rejection_sample",
    "rms_norm",
    "rms_norm_quant",
    "rope_kv_write",
    "rope_kv_write_quant",
    "sample_tokens",
    "scaled_linear",
    "scaled_workspace",
    "shared_prefix_attention",
    "shared_prefix_workspace",
    "silu_and_mul",
    "silu_and_mul_quant",
    "swap_blocks",
    "token_logprobs",
    "unpack_grouped",
    "unpack_weight",
    "update_rows",
    "varlen_attention",
    "weight_norms",
    "weight_only_linear",
    "weight_only_workspace",
    "write_kv",
]
