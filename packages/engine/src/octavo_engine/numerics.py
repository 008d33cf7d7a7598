"""Numerics: where a model runs and in which numbers, as a configuration and the machine come out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.determinism import resolve_deterministic
from octavo_engine.errors import InvalidConfig
from octavo_engine.kv_dtype import dtype_name, resolve_kv_dtype
from octavo_engine.models.config import ModelConfig
from octavo_engine.quant.choose import has_native_products, holds_blocks


class Numerics(NamedTuple):
    """Where the model runs and in which numbers: what `mode`, `dtype` and `device` come to."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    mode: str
    deterministic: bool
    quantization: str | None

    @property
    def root(self) -> bytes:
        """What distinguishes KV of the same tokens and files."""
        rounded = "" if self.quantization is None else f" {self.quantization}"
        return f"{self.dtype} {self.kv_dtype} {self.mode}{rounded}".encode()


def resolve_numerics(config: EngineConfig, model_config: ModelConfig) -> Numerics:
    """Return what a configuration comes to for a model on this machine.

    Raises:
        InvalidConfig: if the device is not there, or something that was asked for is not to be had on it.
    """
    device = _resolve_device(config.device)
    dtype = _resolve_dtype(config.dtype, device, model_config)
    deterministic = resolve_deterministic(config.deterministic, device)
    rounded = config.quantization
    if rounded not in (None, "fp8") and not holds_blocks(device, dtype):
        raise InvalidConfig(
            f"quantization {rounded!r} needs the native CPU kernels and float32, or Triton on a GPU; device is "
            f"{device} and dtype {dtype_name(dtype)}; leave both auto on a CPU, or use a checkpoint that is quantised "
            "already"
        )
    if config.mode == "exact":
        kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, device, dtype)
        return Numerics(device, dtype, kv_dtype, config.mode, deterministic, rounded)
    if device.type != "cpu":
        raise InvalidConfig(f"mode 'fast' is for CPUs, the device is {device}; use mode exact, or device cpu")
    if dtype != torch.float32:
        raise InvalidConfig(
            f"mode 'fast' computes in float32, dtype {dtype_name(dtype)} was asked for; leave dtype auto"
        )
    if not has_native_products(device):
        raise InvalidConfig(
            "mode 'fast' needs the native CPU kernels, which this installation does not have or OCTAVO_CPU_ISA=none "
            "turns off; use mode exact"
        )
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, device, torch.bfloat16)
    return Numerics(device, dtype, kv_dtype, config.mode, deterministic, rounded)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidConfig(f"device {name!r} is none that torch knows; use cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig(f"device {name!r} was asked for, but torch sees no GPU here; use cpu or auto")
    return device


def _resolve_dtype(name: str, device: torch.device, model_config: ModelConfig) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
