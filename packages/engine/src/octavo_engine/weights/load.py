"""Loading: streams a source's weights into a model's slots, each read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.registry import Model, ModelClass, model_class
from octavo_engine.quant.base import QuantMethod, WeightSlot
from octavo_engine.quant.choose import choose_method
from octavo_engine.quant.online import quantize_online
from octavo_engine.quant.quantized import Quantized
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.stored import StoredTensor

Progress = Callable[[int, int], None]
"""(weights loaded, weights in all)"""


Weight = Tensor | StoredTensor | QuantizedTensor
"""A tensor of floating values, or a quantised one as it is stored."""


class WeightSource(Protocol):
    """What loading needs of a source."""

    name: str
    config: ModelConfig
    num_weights: int

    @property
    def is_quantized(self) -> bool:
        """Whether linears come in the codes of a quantised checkpoint."""
        ...

    def weights(self) -> Iterable[tuple[str, Weight]]:
        """Yield each weight once, under its Hugging Face name."""
        ...


def load_model(
    source: WeightSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quant: QuantMethod[Any] | None = None,
    batch_invariant: bool = True,
    quantization: str | None = None,
    progress: Progress | None = None,
    make_model: ModelClass | None = None,
) -> Model:
    """Make a source's model and fill it with its weights.

    Args:
        source: the configuration and the weights.
        device: where the weights go.
        dtype: of activations.
        quant: how matrices are held; None chooses by device and dtype. Of a quantised checkpoint, those without codes.
        batch_invariant: whether a token's bits may not depend on the tokens beside it.
        quantization: `int8`, `int4` or `fp8` rounds linears as they are read, see `quantize_online`; for the first two
            the method must hold GGUF's blocks. None leaves them as they are.
        progress: called after each weight with the number that was read and the total.
        make_model: makes the empty model; None goes by the architecture.

    Raises:
        UnsupportedModel: if no class runs the architecture, or linears that are to be rounded are quantised already.
        CorruptModelFile: if a tensor is missing, unexpected, repeated or of the wrong shape; names it.
    """
    device = torch.device(device)
    quant = quant or choose_method(device, dtype, batch_invariant=batch_invariant)
    if source.is_quantized or quantization == "fp8":
        quant = Quantized(quant, batch_invariant=batch_invariant)
    options = LayerOptions(dtype, device, quant, batch_invariant)
    model = (make_model or model_class(source.config.architecture))(source.config, options)
    weights: Iterable[tuple[str, Weight]] = source.weights()
    if quantization is not None:
        linears = {f"{prefix}{shard.name}.weight" for prefix, linear in model.linears() for shard in linear.shards}
        linears |= {name for prefix, mixture in model.mixtures() for name in mixture.expert_weights(prefix)}
        weights = quantize_online(weights, linears, quantization, source.name)
    load_weights(model, weights, where=source.name, num_weights=source.num_weights, progress=progress)
    model.finish()
    return model


def load_weights(
    model: Model,
    weights: Iterable[tuple[str, Weight]],
    *,
    where: str,
    num_weights: int,
    progress: Progress | None = None,
) -> None:
    """Fill a model with a stream of (name, tensor); errors begin with `where`. Raises as `load_model`."""
    empty = {slot.name: slot for slot in model.slots()}
    filled: set[str] = set()
    for num_read, (name, tensor) in enumerate(weights, start=1):
        slot = empty.pop(name, None)
        if slot is not None:
            _fill(slot, tensor, where)
            filled.add(name)
        elif name in filled:
            raise CorruptModelFile(f"{where}: expected tensor {name!r} once, found it twice")
        elif not model.is_redundant(name):
            raise CorruptModelFile(
                f"{where}: tensor {name!r} of shape {list(tensor.shape)} has no place in a "
                f"{model.config.architecture} with the sizes of its configuration"
            )
        if progress is not None:
            progress(num_read, num_weights)
    if empty:
        raise CorruptModelFile(_missing(where, list(empty.values())))


def _fill(slot: WeightSlot, tensor: Weight, where: str) -> None:
    if tuple(tensor.shape) != slot.shape:
        raise CorruptModelFile(
            f"{where}: tensor {slot.name!r}: expected shape {list(slot.shape)}, found {list(tensor.shape)}"
        )
    if isinstance(tensor, Tensor) and not tensor.is_floating_point():
        raise CorruptModelFile(f"{where}: tensor {slot.name!r}: expected a floating dtype, found {tensor.dtype}")
    slot.fill(tensor)


def _missing(where: str, slots: list[WeightSlot]) -> str:
    first = slots[0]
    others = f", nor {len(slots) - 1} others" if len(slots) > 1 else ""
    return f"{where}: expected tensor {first.name!r} of shape {list(first.shape)}, found none{others}"
