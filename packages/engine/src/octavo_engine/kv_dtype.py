"""In which numbers keys and values are kept: what was asked for, what the device can do, what a checkpoint brings."""

from __future__ import annotations

import logging
import re

import torch

from octavo_engine.errors import InvalidConfig
from octavo_engine.weights.source import FolderSource, Source
from octavo_kvcache import KVCacheSpec

_log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_FP8_CAPABILITY = (8, 9)
_OTHER = re.compile(r"\.[kv]_(global_scale|zero_point)$|[kv]_proj\.output_zero_point$")
"""Of these, what is not followed."""
_SCALES_OF_CHECKPOINTS = re.compile(r"\.([kv]_(global_)?scale|[kv]_zero_point|[kv]_proj\.output_(scale|zero_point))$")
"""Names of tensors; compressed-tensors once kept those of a KV cache as scales of what k_proj and v_proj put out."""


def resolve_kv_dtype(wanted: str, device: torch.device, automatic: torch.dtype) -> torch.dtype:
    """Return the dtype of the KV cache.

    Args:
        wanted: `EngineConfig.kv_cache_dtype`.
        device: where the cache is.
        automatic: what `auto` comes to.

    Raises:
        InvalidConfig: fp8 where the device has no such numbers.
    """
    if wanted == "auto":
        return automatic
    if wanted == "fp8":
        _check_fp8(device)
    return _DTYPES[wanted]


def check_scales(source: Source, kv_dtype: torch.dtype, num_ranks: int = 1) -> None:
    """Refuse a checkpoint with scales for a KV cache where they would not be followed; warn where none is needed.

    Raises:
        InvalidConfig: the cache is in 8 bits, and they have zero points or second factors, or the model is split.
    """
    if (reason := why_not_kept(source, kv_dtype, num_ranks)) is not None:
        raise InvalidConfig(f"{reason}; leave kv_cache_dtype auto, or use a checkpoint without them")
    if (names := _scale_names(source)) and not _in_codes(kv_dtype):
        _log.warning(
            "%s has %d scales for a KV cache in 8 bits, such as %s, which are not used: the KV cache is %s",
            source.name, len(names), names[0], dtype_name(kv_dtype),
        )  # fmt: skip


def why_not_kept(source: Source, kv_dtype: torch.dtype, num_ranks: int = 1) -> str | None:
    """Say why a checkpoint's keys and values cannot be kept in a dtype; None if they can: see `kv_scales`."""
    names = _scale_names(source)
    if not names or not _in_codes(kv_dtype):
        return None
    others = [name for name in names if _OTHER.search(name)]
    if not others and num_ranks == 1:
        return None
    kind = f"{len(others)} zero points or second factors" if others else f"{len(names)} scales"
    where = "" if others else " split over processes"
    return (
        f"{source.name} has {kind} for a KV cache, such as {(others or names)[0]}, and a KV cache of "
        f"{dtype_name(kv_dtype)}{where} does not follow them"
    )


def _in_codes(kv_dtype: torch.dtype) -> bool:
    return KVCacheSpec(1, 1, dtype_name(kv_dtype)).has_scales


def _scale_names(source: Source) -> list[str]:
    if not isinstance(source, FolderSource):
        return []
    return [name for name in source.files.names if _SCALES_OF_CHECKPOINTS.search(name)]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without where it comes from."""
    name: str = str(dtype).removeprefix("torch.")
    return name


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        raise InvalidConfig(
            f"kv_cache_dtype 'fp8' needs a GPU, the device is {device}, whose kernels do not compute with such "
            "numbers; use int8, which takes as much memory"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise InvalidConfig(
            f"kv_cache_dtype 'fp8' needs a GPU of compute capability 8.9 or newer, {device} has "
            f"{capability[0]}.{capability[1]}; use int8, which takes as much memory"
        )
