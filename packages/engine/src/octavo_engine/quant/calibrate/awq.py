"""AWQ (arXiv 2306.00978): inputs that are large on average get finer weights, by scales that others take back.

A linear's weight times scales of its inputs is rounded, and its inputs come divided by them. Nothing divides them as
the model runs: they are outputs of a norm or of a linear, whose own weights are divided once and for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.quant.calibrate.grid import round_to_nearest
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.statistics import InputStatistics
from octavo_engine.quant.calibrate.walk import Halt

_NUM_POWERS = 20
_LEAST_MEAN = 1e-4
_NORM_BEFORE = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}
_LINEAR_BEFORE = {"down_proj": "up_proj", "o_proj": "v_proj"}


class ScaledLinear(NamedTuple):
    """A linear as `Halt` names it, its weight times the scales of its inputs: [out_features, in_features] fp32.

    importance: [in_features] fp32, the mean squares of its inputs, divided by their scales.
    """

    prefix: str
    shards: tuple[tuple[str, int], ...]
    weight: Tensor
    importance: Tensor


def scale_layers(
    halts: Iterable[Halt], options: QuantizeOptions, length: int, divisors: dict[str, Tensor]
) -> Iterator[ScaledLinear]:
    """Choose the scales of each linear's inputs, layer by layer, and take them back in what comes before.

    The outputs of v_proj are scaled only where each is an input of o_proj, so not where heads share keys and values.

    Args:
        halts: of a model's unchanged linears, in their order; weights are not modified.
        options: how scaled weights will be rounded.
        length: tokens of each sequence of the halts' inputs.
        divisors: filled with what the checkpoint's norms and biases are to be divided by, by their names.

    """
    gathered = ((halt, halt.statistics(length)) for halt in halts)
    kept = ((halt._replace(inputs=[]), statistics) for halt, statistics in gathered)
    for layer, items in groupby(kept, key=lambda item: _layer_of(item[0].prefix)):
        yield from _scale_layer(layer, list(items), options, divisors)


def search_scales(weight: Tensor, statistics: InputStatistics, options: QuantizeOptions) -> Tensor:
    """Return scales s = mean|x| ** power, for the power from 0 to 1 with the least error of outputs (equations 4, 5).

    Args:
        weight: [out_features, in_features] fp32.
        statistics: of the linear's inputs.
        options: how scaled weights are rounded.

    Returns:
        [in_features] fp32, the middle of their range at 1.

    """
    size = options.group_size or weight.shape[1]
    hessian = statistics.hessian.float()
    means = statistics.mean_abs.clamp(min=_LEAST_MEAN)
    best, least = torch.ones_like(means), float("inf")
    for power in range(_NUM_POWERS):
        scales = means ** (power / _NUM_POWERS)
        scales /= (scales.max() * scales.min()).sqrt()
        rounded = round_to_nearest(weight * scales, options.bits, size, symmetric=options.symmetric).values() / scales
        error = output_error(rounded - weight, hessian)
        if error < least:
            best, least = scales, error
    return best


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Return the mean square, summed over outputs, of what a change of the weight changes in a linear's outputs.

    Args:
        difference: [out_features, in_features] fp32.
        hessian: [in_features, in_features] fp32, the inputs' mean outer product.

    """
    return float(((difference @ hessian) * difference).sum())


def _scale_layer(
    layer: str, items: list[tuple[Halt, InputStatistics]], options: QuantizeOptions, divisors: dict[str, Tensor]
) -> Iterator[ScaledLinear]:
    rows = {name: num_rows for halt, _ in items for name, num_rows in halt.shards}
    scaled: list[ScaledLinear] = []
    row_divisors: dict[str, Tensor] = {}
    for halt, statistics in items:
        weight = halt.parameters.weight
        importance = statistics.hessian.diagonal().float()
        first = halt.shards[0][0]
        before = _LINEAR_BEFORE.get(first)
        if first in _NORM_BEFORE or (before is not None and rows.get(before) == weight.shape[1]):
            scales = search_scales(weight, statistics, options)
            weight, importance = weight * scales, importance / scales.square()
            if first in _NORM_BEFORE:
                divisors[f"{layer}{_NORM_BEFORE[first]}.weight"] = scales
            elif before is not None:
                row_divisors[before] = scales
        scaled.append(ScaledLinear(halt.prefix, halt.shards, weight, importance))
    for linear in scaled:
        yield linear._replace(weight=_divided(linear, row_divisors, divisors))


def _divided(linear: ScaledLinear, row_divisors: dict[str, Tensor], divisors: dict[str, Tensor]) -> Tensor:
    """Return a weight with the rows of some shards divided; their biases are noted in `divisors`."""
    parts = []
    sizes = [num_rows for _, num_rows in linear.shards]
    for (name, _), rows in zip(linear.shards, torch.split(linear.weight, sizes), strict=True):
        if name in row_divisors:
            divisors[f"{linear.prefix}{name}.bias"] = row_divisors[name]
            rows = rows / row_divisors[name][:, None]
        parts.append(rows)
    return torch.cat(parts)


def _layer_of(prefix: str) -> str:
    """Return what the names of a layer begin with: `model.layers.0.` of `model.layers.0.mlp.`."""
    return prefix.rstrip(".").rpartition(".")[0] + "."
