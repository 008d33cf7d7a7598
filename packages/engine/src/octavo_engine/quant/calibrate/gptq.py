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
    work = weight.clone() if order is None else weight[:, order]
    upper = _inverse_factor(hessian if order is None else hessian[order][:, order], settings.damping)
    size = settings.group_size
    block = size * max(1, _BLOCK // size) if size < _BLOCK else _BLOCK
    codes = torch.empty(work.shape, dtype=torch.uint8)
    grids: list[Grid] = []
    for start in range(0, work.shape[1], block):
        span = slice(start, min(start + block, work.shape[1]))
        errors = _round_block(work, span, upper, settings, codes, grids)
        work[:, span.stop :] -= errors @ upper[span, span.stop :]
    groups = torch.arange(work.shape[1]) // size
    scales = torch.stack([grid.scales for grid in grids]).half()
    zeros = torch.stack([grid.zeros for grid in grids]).to(torch.int16)
    if order is not None:
        back = order.argsort()
        codes, groups = codes[:, back], groups[back]
    return Codes(codes.T.contiguous(), scales, zeros, groups, settings.bits)


def _round_block(
    work: Tensor, span: slice, upper: Tensor, settings: GPTQSettings, codes: Tensor, grids: list[Grid]
) -> Tensor:
    """Round some columns in turn, each after those before it were made up for; return the errors, per diagonal.

    Args:
        work: [out_features, in_features] fp32; columns of `span` are corrected in place.
        span: the columns.
        upper: [in_features, in_features] fp32, the factor of the inverse Hessian.
        settings: how grids are chosen; one is appended to `grids` for each group that begins.
        codes: [out_features, in_features] uint8, filled in the columns of `span`.
        grids: of the groups so far.
    """
    errors = torch.empty(len(work), span.stop - span.start)
    for column in range(span.start, span.stop):
        if column % settings.group_size == 0:
            group = work[:, column : column + settings.group_size]
            grids.append(Grid.around(group, settings.bits, symmetric=settings.symmetric))
        found = grids[-1].codes(work[:, column])
        codes[:, column] = found.to(torch.uint8)
        error = (work[:, column] - grids[-1].values(found)) / upper[column, column]
        work[:, column : span.stop].addr_(error, upper[column, column : span.stop], alpha=-1)
        errors[:, column - span.start] = error
    return errors


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Hessian, fp32 (step 3 of the paper).

    Inputs that are always 0 say nothing of their weights, so these are rounded by themselves.
    """
    if not bool(hessian.isfinite().all()):
        raise UnsupportedModel("a linear is given inputs that are not finite, so nothing can be learnt from them")
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    while damping <= _MOST_DAMPING:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper, dtype=torch.float32)
        _log.warning("a Hessian damped by %g is not positive definite; ten times that is tried", damping)
        damping *= 10
    raise UnsupportedModel("a linear's Hessian cannot be inverted, whatever is added to its diagonal; use method rtn")
