"""choose_scheme: the format of a checkpoint, by what its configuration says of quantisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from octavo_engine.quant.schemes.auto_round import auto_round
from octavo_engine.quant.schemes.awq import AWQ
from octavo_engine.quant.schemes.base import Scheme
from octavo_engine.quant.schemes.bitsandbytes import BitsAndBytes
from octavo_engine.quant.schemes.compressed import CompressedTensors
from octavo_engine.quant.schemes.fp8 import FP8
from octavo_engine.quant.schemes.gptq import GPTQ
from octavo_engine.quant.schemes.modelopt import ModelOpt
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.quant.schemes.torchao import TorchAO

_SCHEMES: Mapping[str, Callable[[Settings], Scheme]] = MappingProxyType(
    {
        "auto-round": auto_round,
        "awq": AWQ,
        "bitsandbytes": BitsAndBytes,
        "compressed-tensors": CompressedTensors,
        "fbgemm_fp8": FP8,
        "fp8": FP8,
        "gptq": GPTQ,
        "intel/auto-round": auto_round,
        "modelopt": ModelOpt,
        "modelopt_fp4": ModelOpt,
        "torchao": TorchAO,
    }
)


def choose_scheme(values: Mapping[str, Any], where: str) -> Scheme:
    """Return how a checkpoint stores its linears.

    Args:
        values: the parsed `quantization_config`; not modified.
        where: the file and key that it is from, for error messages.

    Raises:
        UnsupportedModel: if the method, a version or an option of it is none that we read; lists those we do.
        CorruptModelFile: if a value is missing, of the wrong type or out of range.
    """
    settings = Settings(values, where)
    return _SCHEMES[settings.choice("quant_method", tuple(_SCHEMES))](settings)
