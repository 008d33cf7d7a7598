"""Products by weights that stay in the codes of a quantised checkpoint: by integers as they are, by others expanded."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from octavo_engine.quant.grouped import GroupedProduct, as_grouped
from octavo_engine.quant.onednn import linear
from octavo_engine.weights.grouped_integers import GroupedIntegers
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_kernels import IntWeight, int_weight_from_codes, weight_only_linear

_log = logging.getLogger(__name__)

_CHUNK_VALUES = 1 << 24  # weights expanded at once: 64 MiB of fp32
_KERNEL_BITS = (4, 8)
_LEAST_GROUP = 16


class Product(Protocol):
    """A weight in the form in which it is multiplied, and its product."""

    num_bytes: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [num_tokens, in_features] times the weight, plus the bias: [num_tokens, out_features]."""
        ...


def make_product(weight: QuantizedTensor, device: torch.device, *, batch_invariant: bool, native: bool) -> Product:
    """Return a weight's product on a device: by codes if kernels take its groups, else by expanding it.

    On a GPU these are those of `weight_only_linear`, whose reference on a CPU would expand the weight too, to fp64; on
    a CPU those of `grouped_linear`, where products by dense matrices are `native` too.
    """
    if native:
        grouped = as_grouped(weight)
        if grouped is not None:
            return GroupedProduct(grouped)
        _log.info(
            "a linear %s of %s has no native product: torch expands it at each use", weight.shape, type(weight).__name__
        )
    if device.type != "cpu" and isinstance(weight, GroupedIntegers) and weight.bits in _KERNEL_BITS:
        size, whole = weight.group_size, weight.group_size >= weight.shape[1]
        if weight.has_even_groups() and (whole or (size >= _LEAST_GROUP and size & (size - 1) == 0)):
            return IntegerProduct(weight, device)
    return ExpandingProduct(weight, device, batch_invariant=batch_invariant)


class IntegerProduct:
    """A weight of 4 or 8 bits, in the layout of `octavo_kernels.weight_only_linear`.

    Args:
        weight: as the checkpoint has it; its groups are even.
        device: where products are made.
    """

    def __init__(self, weight: GroupedIntegers, device: torch.device) -> None:
        order = None if weight.groups is None else weight.groups.argsort(stable=True)
        self._order = None if order is None else order.to(device)
        self._weight = _int_weight(weight, order, device)
        self.num_bytes = self._weight.num_bytes + (0 if order is None else order.numel() * order.element_size())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply codes, by inputs in the order of their groups."""
        return weight_only_linear(x if self._order is None else x[:, self._order], self._weight, bias)


class ExpandingProduct:
    """A weight of any format: its values are made anew for every product, some rows of the weight at a time."""

    def __init__(self, weight: QuantizedTensor, device: torch.device, *, batch_invariant: bool) -> None:
        self._weight = weight.on(device)
        self._batch_invariant = batch_invariant
        self.num_bytes = self._weight.num_bytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Expand and multiply; the values are rounded to the dtype of x."""
        out_features, in_features = self._weight.shape
        out = torch.empty((len(x), out_features), dtype=x.dtype, device=x.device)
        step = max(1, _CHUNK_VALUES // in_features)
        for start in range(0, out_features, step):
            rows = slice(start, min(start + step, out_features))
            values = self._weight.values(rows).to(x.dtype)
            out[:, rows] = linear(
                x, values, None if bias is None else bias[rows], batch_invariant=self._batch_invariant
            )
        return out


def _int_weight(weight: GroupedIntegers, order: Tensor | None, device: torch.device) -> IntWeight:
    """Pack codes in the kernels' layout, some outputs at a time; `order` is the inputs in the order of their groups."""
    out_features, in_features = weight.shape
    step = max(1, _CHUNK_VALUES // 4 // in_features)
    words = []
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        codes = weight.codes(rows)
        part = int_weight_from_codes(
            codes if order is None else codes[order],
            weight.scales[:, rows],
            bits=weight.bits,
            group_size=min(weight.group_size, in_features),
        )
        words.append(part.words)
    zeros, zero_point = weight.zeros, weight.zero_point
    if zeros is not None and bool((zeros == zeros[0, 0]).all()):
        zero_point, zeros = int(zeros[0, 0]), None
    return IntWeight(
        torch.cat(words, dim=1).to(device),
        weight.scales.to(device, copy=True).contiguous(),
        None if zeros is None else zeros.to(device, copy=True).contiguous(),
        None,
        in_features,
        min(weight.group_size, in_features),
        weight.bits,
        zero_point,
    )
