"""resolve_kv_dtype: in which numbers keys and values are kept, by what the user asked for and the device can do."""

from __future__ import annotations

import logging

import torch

from octavo_engine.errors import InvalidConfig
from octavo_engine.weights.source import FolderSource, Source
from octavo_kvcache.spec import CODE_DTYPES

_log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_FP8_CAPABILITY = (8, 9)
_SCALES_OF_CHECKPOINTS = ("k_scale", "v_scale", "k_global_scale", "v_global_scale", "k_zero_point", "v_zero_point")


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


def warn_of_unused_scales(source: Source, kv_dtype: torch.dtype) -> None:
    """Tell the user where a checkpoint has scales for a KV cache, for none of them is used."""
    if not isinstance(source, FolderSource):
        return
    names = [name for name in source.files.names if name.rpartition(".")[2] in _SCALES_OF_CHECKPOINTS]
    if not names:
        return
    name = str(kv_dtype).removeprefix("torch.")
    if name in CODE_DTYPES:
        instead = f"{name} with a scale of its own for each cached vector, which is finer"
    else:
        instead = f"{name}, which needs none; --kv-cache-dtype int8 or fp8 keeps it in 8 bits"
    _log.warning(
        "%s has %d scales for a KV cache, such as %s, which are not used: the KV cache is %s",
        source.name, len(names), names[0], instead,
    )  # fmt: skip


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
