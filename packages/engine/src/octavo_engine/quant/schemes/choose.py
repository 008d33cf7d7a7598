"""choose_scheme: the format of a checkpoint, by what its configuration says of quantisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from octavo_engine.quant.schemes.awq import AWQ
from octavo_engine.quant.schemes.base import Scheme
from octavo_engine.quant.schemes.compressed import CompressedTensors
from octavo_engine.quant.schemes.gptq import GPTQ
from octavo_engine.quant.schemes.settings import Settings

_SCHEMES: Mapping[str, Callable[[Settings], Scheme]] = MappingProxyType(
    {"awq": AWQ, "compressed-tensors": CompressedTensors, "gptq": GPTQ}
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
