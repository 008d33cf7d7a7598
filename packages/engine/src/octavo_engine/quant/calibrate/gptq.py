"""GPTQ (arXiv 2210.17323): rounds a linear's inputs one after the other, and makes up for it in those that follow."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.errors import UnsupportedModel
from octavo_engine.quant.calibrate.grid import Codes, Grid

_BLOCK = 128  # columns that are corrected at once: the paper's lazy batches
_MOST_DAMPING = 1.0
_CHUNK_OUTPUTS = 256  # whose grids are chosen at once: all that are tried fit into a core's cache

SHRINKS = tuple(1.05 - 0.025 * step for step in range(13))
SHIFTS = (-1, 0, 1)
"""Of the scales and zeros of the grid that spans a group's weights: which others are tried."""

NEARER = (1.0, 0.99, 0.995, 1.005, 1.01)
"""Of the best of these scales: which are tried then."""

_log = logging.getLogger(__name__)


class GPTQSettings(NamedTuple):
    """Bits of a code, inputs that share a scale, and how they are chosen; see `QuantizeOptions`."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False
    damping: float = 0.01


def gptq(weight: Tensor, hessian: Tensor, settings: GPTQSettings) -> Codes:
    """Round a weight so that its products with the inputs of a Hessian change little (algorithm 1 of the paper).

    Args:
        weight: [out_features, in_features] fp32; not modified.
        hessian: [in_features, in_features] fp64, the inputs' mean outer product; not modified.
        settings: how codes and groups are chosen.

    Raises:
        UnsupportedModel: if a scale would not be a number of fp16, or the Hessian is not finite.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True) if settings.act_order else None
    work = (weight if order is None else weight[:, order]).T.contiguous().clone()  # [in_features, out_features]
    upper = _inverse_factor(hessian if order is None else hessian[order][:, order], settings.damping)
    size = settings.group_size
    block = size * max(1, _BLOCK // size) if size < _BLOCK else _BLOCK
    codes = torch.empty(work.shape, dtype=torch.uint8)
    num_inputs = len(work)
    grids: list[Grid] = []
    for start in range(0, num_inputs, block):
        span = slice(start, min(start + block, num_inputs))
        errors = _round_block(work, span, upper, settings, codes, grids)
        work[span.stop :].addmm_(upper[span, span.stop :].T, errors, alpha=-1)
    groups = torch.arange(num_inputs) // size
    scales = torch.stack([grid.scales for grid in grids]).half()
    zeros = torch.stack([grid.zeros for grid in grids]).to(torch.int16)
    if order is not None:
        back = order.argsort()
        codes, groups = codes[back], groups[back]
    return Codes(codes, scales, zeros, groups, settings.bits)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return a Hessian with a share of its diagonal's mean added to the diagonal."""
    mean = float(hessian.diagonal().mean()) or 1.0
    return hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)


def _round_block(
    work: Tensor, span: slice, upper: Tensor, settings: GPTQSettings, codes: Tensor, grids: list[Grid]
) -> Tensor:
    """Round some inputs' weights in turn, after those before were made up for; return the errors, per diagonal.

    Args:
        work: [in_features, out_features] fp32; those of `span` are corrected in place.
        span: the inputs.
        upper: [in_features, in_features] fp32, the factor of the inverse Hessian.
        settings: how grids are chosen; one is appended to `grids` for each group that begins.
        codes: [in_features, out_features] uint8, filled in `span`.
        grids: of the groups so far.
    """
    errors = torch.empty_like(work[span])
    for row in range(span.start, span.stop):
        if row % settings.group_size == 0:
            inputs = slice(row, row + settings.group_size)
            grids.append(_grid_of(work[inputs], upper[inputs, inputs], settings))
        found = grids[-1].codes(work[row])
        codes[row] = found.to(torch.uint8)
        error = errors[row - span.start]
        torch.sub(work[row], grids[-1].values(found), out=error).div_(float(upper[row, row]))
        work[row : span.stop].addr_(upper[row, row : span.stop], error, alpha=-1)
    return errors


def _grid_of(work: Tensor, upper: Tensor, settings: GPTQSettings) -> Grid:
    """Return a group's grid: for each output the one, of those tried, by which rounding the group in turn costs least.

    Costs are those of equation 2, once inputs that follow have made up for an error. So a zero that moves all weights
    of a group the same way is found out where inputs have a mean.

    Args:
        work: [group_size, out_features] fp32; not modified.
        upper: [group_size, group_size] fp32, the group's part of the factor.
        settings: how grids are chosen.
    """
    span = Grid.around(work.T, settings.bits, symmetric=settings.symmetric)
    scales, zeros = span.scales.clone(), span.zeros.clone()
    for start in range(0, work.shape[1], _CHUNK_OUTPUTS):
        part = slice(start, start + _CHUNK_OUTPUTS)
        near = Grid(span.scales[part], span.zeros[part], span.most)
        for shrinks, shifts in ((SHRINKS, (0,) if settings.symmetric else SHIFTS), (NEARER, (0,))):
            near = _cheapest(near.others(shrinks, shifts), work[:, None, part], upper)
        scales[part], zeros[part] = near.scales, near.zeros
    return Grid(scales, zeros, span.most)


def _cheapest(grids: Grid, work: Tensor, upper: Tensor) -> Grid:
    """Return for each output the grid by which rounding a group costs least.

    Args:
        grids: scales and zeros of [num_grids, out_features].
        work: [group_size, 1, out_features] fp32; not modified.
        upper: [group_size, group_size] fp32.
    """
    work = work.expand(-1, *grids.scales.shape).clone()
    cost = torch.zeros_like(grids.scales)
    for row in range(len(work)):
        error = (work[row] - grids.values(grids.codes(work[row]))).div_(float(upper[row, row]))
        cost.addcmul_(error, error)
        work[row + 1 :].sub_(upper[row, row + 1 :, None, None] * error)
    least = cost.argmin(dim=0, keepdim=True)
    return Grid(grids.scales.gather(0, least)[0], grids.zeros.gather(0, least)[0], grids.most)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Hessian, fp32 (step 3 of the paper).

    Inputs that are always 0 say nothing of their weights, so these are rounded by themselves.
    """
    if not bool(hessian.isfinite().all()):
        raise UnsupportedModel("a linear is given inputs that are not finite, so nothing can be learnt from them")
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = float(diagonal.mean()) or 1.0
    while damping <= _MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper, dtype=torch.float32)
        _log.warning("a Hessian damped by %g is not positive definite; ten times that is tried", damping)
        damping *= 10
    raise UnsupportedModel("a linear's Hessian cannot be inverted, whatever is added to its diagonal; use method rtn")
