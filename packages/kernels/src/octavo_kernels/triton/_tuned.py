"""What kernels ask the tuning cache: a tile with a configuration's sizes in the place of its own."""

import functools
import logging
from typing import NamedTuple, TypeVar

import torch

from octavo_kernels.errors import OptionError
from octavo_kernels.triton._launch import interpreted
from octavo_kernels.tuning import Config, Key, row_bucket, tuning_cache

_log = logging.getLogger(__name__)
_AnyTile = TypeVar("_AnyTile", bound=NamedTuple)


def tuned(
    op: str,
    default: _AnyTile,
    tunable: tuple[str, ...],
    *,
    rows: int,
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
) -> _AnyTile:
    """Return a kernel's default tile with what the cache says in its place.

    In fp32, whose bits are to be the same in every batch, and in the interpreter it is the default. Where there is no
    configuration for a device, the log says so once for each op.

    Raises:
        OptionError: a configuration has a name that may not be tuned.
    """
    if interpreted() or dtype == torch.float32:
        return default
    key = tuning_key(op, rows=rows, shape=shape, dtype=dtype, device=device)
    config = tuning_cache().find(key)
    if config is None:
        _say_missing(op, key.device)
    return with_config(op, default, tunable, config)


def tuning_key(op: str, *, rows: int, shape: str, dtype: torch.dtype, device: torch.device) -> Key:
    """Return what a launch's configuration is kept by."""
    return Key(op, device_name(device), str(dtype).removeprefix("torch."), row_bucket(rows), shape)


def with_config(op: str, default: _AnyTile, tunable: tuple[str, ...], config: Config | None) -> _AnyTile:
    """Return a tile with the sizes of a configuration.

    Raises:
        OptionError: it has a name that may not be tuned.
    """
    unknown = {*(config or {})} - {*tunable}
    if unknown:
        raise OptionError(
            f"{op} (triton): a tuned configuration has {', '.join(sorted(unknown))}, expected {', '.join(tunable)}; "
            "measure again with python -m octavo_kernels.tune"
        )
    return default._replace(**(config or {}))


@functools.cache
def device_name(device: torch.device) -> str:
    """Return a device's name as configurations have it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@functools.cache
def _say_missing(op: str, device: str) -> None:
    _log.warning(
        "%s: no launch configuration for %s, the kernel's own serves; python -m octavo_kernels.tune measures some",
        op,
        device,
    )
