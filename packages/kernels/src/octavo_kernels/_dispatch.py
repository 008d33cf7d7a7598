"""Backend, and the choice of one for an op: by the tensors' device, or by OCTAVO_BACKEND."""

import functools
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Literal, NamedTuple, cast

import torch

from octavo_kernels.cuda.load import library_path, why_not
from octavo_kernels.errors import BackendFallbackWarning, BackendUnavailable, OptionError


class Backend(Enum):
    """Who computes an op.

    REFERENCE: plain torch, the specification, any device; it also serves the ops that are written for GPUs where no
    kernel runs. CPU: native code on CPU tensors, and batched torch where that does not serve, which includes any other
    device where no kernel exists. TRITON: CUDA and ROCm, or CPU tensors under TRITON_INTERPRET=1. CUDA: compiled C++,
    for a few ops, where a build of it is installed; Triton serves the others.
    """

    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"


class Fallback(NamedTuple):
    """One op that ran on other code than the one asked for, how many calls did, and why the first one did.

    `used` is a backend, or "torch": the batched torch code of the `cpu` backend, where its native library is absent or
    does not serve the call. `reason` is empty where a backend simply lacks the op.
    """

    wanted: Backend
    used: Backend | Literal["torch"]
    num_calls: int
    reason: str = ""


# Which file of each backend's folder holds an op.
_STEMS: Mapping[str, str] = MappingProxyType(
    {
        "paged_attention": "attention",
        "varlen_attention": "attention",
        "shared_prefix_attention": "shared_attention",
        "mla_decode": "mla",
        "write_kv": "cache_ops",
        "copy_blocks": "cache_ops",
        "gather_kv": "cache_ops",
        "rope_kv_write": "rope",
        "rope_kv_write_quant": "rope",
        "rms_norm": "norm",
        "rms_norm_quant": "norm",
        "add_rms_norm": "norm",
        "add_rms_norm_quant": "norm",
        "silu_and_mul": "activation",
        "silu_and_mul_quant": "activation",
        "gelu_and_mul": "activation",
        "gelu_and_mul_quant": "activation",
        "gelu": "activation",
        "gelu_quant": "activation",
        "pack_weight": "matmul",
        "unpack_weight": "matmul",
        "packed_linear": "matmul",
        "packed_embedding": "matmul",
        "packed_argmax": "matmul",
        "packed_sample": "packed_sample",
        "grouped_linear": "grouped",
        "grouped_argmax": "grouped",
        "weight_only_linear": "weight_only",
        "quantize_rows": "quantize",
        "scaled_linear": "scaled_linear",
        "group_rows": "row_groups",
        "fused_moe": "moe",
        "lora_shrink": "lora",
        "lora_expand": "lora",
        "lora_linear": "lora",
        "merge_states": "merge",
        "philox": "noise",
        "gumbel_noise": "noise",
        "gumbel_noise_at": "noise",
        "sample_tokens": "sampling",
        "apply_filters": "filters",
        "apply_penalties": "penalties",
        "token_logprobs": "logprobs",
        "rejection_sample": "speculation",
        "apply_token_bitmask": "bitmask",
        "update_rows": "row_state",
        "expand_rows": "row_state",
        "advance_rows": "row_state",
    }
)

# Written for GPUs: the `cpu` backend has no code of its own for them, and the reference serves in its place.
_FOR_GPUS = frozenset(
    {
        "shared_prefix_attention",
        "mla_decode",
        "rms_norm_quant",
        "add_rms_norm_quant",
        "silu_and_mul_quant",
        "gelu_and_mul_quant",
        "gelu_quant",
        "apply_filters",
        "apply_penalties",
        "token_logprobs",
        "rejection_sample",
        "weight_only_linear",
        "quantize_rows",
        "scaled_linear",
        "fused_moe",
        "update_rows",
        "expand_rows",
        "advance_rows",
    }
)

_OPS: Mapping[Backend, frozenset[str]] = MappingProxyType(
    {
        Backend.REFERENCE: frozenset(_STEMS),
        Backend.CPU: frozenset(_STEMS) - _FOR_GPUS,
        Backend.TRITON: frozenset(
            {
                "paged_attention",
                "varlen_attention",
                "shared_prefix_attention",
                "mla_decode",
                "write_kv",
                "copy_blocks",
                "gather_kv",
                "merge_states",
                "rope_kv_write",
                "rope_kv_write_quant",
                "rms_norm",
                "rms_norm_quant",
                "add_rms_norm",
                "add_rms_norm_quant",
                "silu_and_mul",
                "silu_and_mul_quant",
                "gelu_and_mul",
                "gelu_and_mul_quant",
                "gelu",
                "gelu_quant",
                "philox",
                "gumbel_noise",
                "gumbel_noise_at",
                "sample_tokens",
                "apply_filters",
                "apply_penalties",
                "token_logprobs",
                "rejection_sample",
                "apply_token_bitmask",
                "packed_linear",
                "packed_embedding",
                "weight_only_linear",
                "quantize_rows",
                "scaled_linear",
                "group_rows",
                "fused_moe",
                "lora_shrink",
                "lora_expand",
                "lora_linear",
                "update_rows",
                "expand_rows",
                "advance_rows",
            }
        ),
        Backend.CUDA: frozenset({"copy_blocks", "paged_attention"}),
    }
)

# Compiled ops that OCTAVO_CUDA_OPS or OCTAVO_BACKEND has to ask for: no GPU has shown yet that they are faster.
_ON_REQUEST = frozenset({"paged_attention"})
# Compiled ops whose calls need Triton's kernels before and after them.
_WITH_TRITON = frozenset({"paged_attention"})


class _FallbackLog:
    """Counts fallbacks per op, and says which call is the first."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Fallback] = {}
        self._lock = threading.Lock()

    def add(self, op: str, wanted: Backend, used: Backend | Literal["torch"], reason: str = "") -> bool:
        key = op, used if isinstance(used, str) else used.value
        with self._lock:
            known = self._entries.get(key) or Fallback(wanted, used, 0, reason)
            self._entries[key] = known._replace(num_calls=known.num_calls + 1)
            return known.num_calls == 0

    def snapshot(self) -> dict[str, Fallback]:
        """Return one entry per op: where a call went from backend to backend to torch, the last one."""
        with self._lock:
            return {op: entry for (op, _), entry in self._entries.items()}

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


_log = _FallbackLog()


def available_backends() -> tuple[Backend, ...]:
    """Return the backends that can run in this process, in the order of the enum.

    Triton counts when it is installed and a GPU is visible, or when TRITON_INTERPRET=1 asks for its interpreter.
    """
    return tuple(backend for backend in Backend if _unavailable(backend) is None)


def choose(op: str, device: torch.device | str) -> Backend:
    """Return the backend that a call of `op` on `device` would use now, reading OCTAVO_BACKEND and OCTAVO_CUDA_OPS.

    Without OCTAVO_BACKEND: `cpu` on CPU tensors; elsewhere `cuda` when it has the op, is installed and can run, then
    `triton` when it has the op and can run, else `cpu`. `paged_attention` is `cuda`'s only where OCTAVO_CUDA_OPS, names
    with commas between them, has it. With OCTAVO_BACKEND: the named backend when it has the op, else `cpu`; for
    `cuda` what would serve without it. In place of `cpu`, `reference` for ops that are written for GPUs.

    Raises:
        OptionError: unknown op, unknown OCTAVO_BACKEND, or a name in OCTAVO_CUDA_OPS that is no compiled op.
        BackendUnavailable: the forced backend cannot run.
    """
    return _resolve(op, torch.device(device).type)[1]


def fallbacks() -> dict[str, Fallback]:
    """Return, by op, what ran on other code than the one asked for since the process started.

    Entries with `used="torch"` are calls on the CPU that the native library could not serve; OCTAVO_CPU_ISA=none asks
    for torch, and makes none.
    """
    return _log.snapshot()


def note_fallback(op: str, reason: str) -> None:
    """Count a call of `op` that the native library does not serve, so that torch does; warn once per op.

    `reason` says what about the call is not served and what to do, for example "head_dim is 80, expected a multiple of
    16; pad it".
    """
    if count_fallback(op, reason):
        warnings.warn(
            f"{op}: torch serves it, not the native library: {reason}; see octavo_kernels.fallbacks()",
            BackendFallbackWarning,
            stacklevel=4,
        )


def count_fallback(op: str, reason: str) -> bool:
    """Count such a call without a warning; say whether it was the first."""
    return _log.add(op, Backend.CPU, "torch", reason)


def note_served_by_triton(op: str, reason: str) -> None:
    """Count a call that a compiled kernel does not serve, so that Triton does; warn once per op.

    `reason` says what about the call is not served and what to do.
    """
    if _log.add(op, Backend.CUDA, Backend.TRITON, reason):
        warnings.warn(
            f"{op}: triton serves it, not the compiled kernel: {reason}; see octavo_kernels.fallbacks()",
            BackendFallbackWarning,
            stacklevel=4,
        )


def implementation(op: str, device: torch.device) -> Callable[..., None]:
    """Return the function that serves `op` on `device`; warn once per op when it is not the backend asked for."""
    wanted, used = _resolve(op, device.type)
    reason = "" if wanted is used or wanted is not Backend.CUDA else _unavailable(wanted, device.type, op) or ""
    if wanted is not used and _log.add(op, wanted, used, reason):
        because = f" ({reason})" if reason else ""
        warnings.warn(
            f"{op}: the {wanted.value} backend does not serve it here, {used.value} does{because}; "
            "see octavo_kernels.fallbacks()",
            BackendFallbackWarning,
            stacklevel=3,
        )
    return _load(used, op, device.type)


def _resolve(op: str, device_type: str) -> tuple[Backend, Backend]:
    """Return the backend asked for, and the one that serves."""
    if op not in _STEMS:
        raise OptionError(f"choose: op is {op!r}, expected one of {', '.join(_STEMS)}; pass such a name")
    without_kernel = Backend.CPU if op in _OPS[Backend.CPU] else Backend.REFERENCE
    forced = _forced()
    if forced is not None:
        wanted = without_kernel if forced is Backend.CPU else forced
        serves = op in _OPS[wanted]
        # What a GPU's backend lacks, packing a weight say, may have its tensors on the host.
        reason = _unavailable(forced, device_type if serves or device_type != "cpu" else None, op if serves else None)
        if reason is not None:
            raise BackendUnavailable(f"OCTAVO_BACKEND={forced.value}: {reason}")
        if serves:
            return wanted, wanted
        return wanted, _by_triton(op, without_kernel)[1] if wanted is Backend.CUDA else without_kernel
    if device_type != "cuda":
        return without_kernel, without_kernel
    wanted, used = _by_triton(op, without_kernel)
    requested = op in _requested()
    if requested or (op in _OPS[Backend.CUDA] - _ON_REQUEST and library_path() is not None):
        return Backend.CUDA, Backend.CUDA if _unavailable(Backend.CUDA, device_type, op) is None else used
    return wanted, used


def _by_triton(op: str, without_kernel: Backend) -> tuple[Backend, Backend]:
    """Return who is asked for and who serves on a GPU where no compiled kernel does."""
    if op not in _OPS[Backend.TRITON]:
        return without_kernel, without_kernel
    return Backend.TRITON, Backend.TRITON if _unavailable(Backend.TRITON) is None else without_kernel


def _forced() -> Backend | None:
    name = os.environ.get("OCTAVO_BACKEND", "")
    if not name:
        return None
    try:
        return Backend(name)
    except ValueError:
        names = ", ".join(backend.value for backend in Backend)
        raise OptionError(
            f"OCTAVO_BACKEND is {name!r}, expected one of {names}; set one of them, or unset it"
        ) from None


def _requested() -> tuple[str, ...]:
    """Return the ops that OCTAVO_CUDA_OPS names."""
    value = os.environ.get("OCTAVO_CUDA_OPS", "")
    if not value:
        return ()
    names = tuple(name.strip() for name in value.split(","))
    known = _OPS[Backend.CUDA]
    if not known.issuperset(names):
        raise OptionError(
            f"OCTAVO_CUDA_OPS is {value!r}, expected names of {', '.join(sorted(known))}, with commas between them; "
            "set such names, or unset it"
        )
    return names


def _unavailable(backend: Backend, device_type: str | None = None, op: str | None = None) -> str | None:
    """Say why a backend cannot run (on a device; or an op of its own), or None when it can."""
    if backend is Backend.CUDA:
        if op in _WITH_TRITON and not _has_triton():
            return f"triton, which plans and joins {op}, is not installed; install torch's GPU build"
        return why_not(device_type)
    if backend is not Backend.TRITON:
        return None
    if not _has_triton():
        return "triton is not installed; install octavo-kernels[interpreter], or torch's GPU build"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "the tensors are on the CPU; set TRITON_INTERPRET=1 before the first call, or pass GPU tensors"
    if not interpreted and not torch.cuda.is_available():
        return "no GPU is visible; set TRITON_INTERPRET=1 before the first call to interpret kernels on the CPU"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _load(backend: Backend, op: str, device_type: str = "cpu") -> Callable[..., None]:
    """Return a backend's function; on another device than the CPU the `cpu` backend is its torch fallback."""
    folder = "cpu.fallback" if backend is Backend.CPU and device_type != "cpu" else backend.value
    module = importlib.import_module(f"octavo_kernels.{folder}.{_STEMS[op]}")
    return cast("Callable[..., None]", getattr(module, op))
