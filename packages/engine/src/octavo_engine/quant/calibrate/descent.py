"""descend: goes on from a rounded matrix to codes and scales by which its products change less still.

GPTQ rounds an input's weights once, when those that follow are not rounded yet. Here every code is looked at again
beside all others as they are now (coordinate descent, QuantEase, arXiv 2309.01885), and all scales of an output are
fitted to its codes at once, by least squares. Neither step makes the error larger, but for scales that fp16 rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_engine.quant.calibrate.grid import Codes, Grid, representable

_BLOCK = 64  # inputs between two products by the whole Hessian
_RIDGE = 1e-6  # share of a system's mean diagonal: of groups whose codes are all zero


def descend(codes: Codes, weight: Tensor, hessian: Tensor, num_rounds: int) -> Codes:
    """Return a matrix with other codes and scales, nearer to a weight; zeros and groups stay.

    Args:
        codes: the rounded matrix; not modified.
        weight: [out_features, in_features] fp32, what it stands for; not modified.
        hessian: [in_features, in_features], positive definite: the inputs' mean outer product, damped.
        num_rounds: how often scales are fitted, and codes looked at.
    """
    target, hessian, found = weight.T.contiguous(), hessian.float(), codes  # target [in_features, out_features]
    for _ in range(num_rounds):
        found = found._replace(scales=_fitted_scales(found, target, hessian))
        found = found._replace(codes=_nearer_codes(found, target, hessian))
    return found


def _nearer_codes(found: Codes, target: Tensor, hessian: Tensor) -> Tensor:
    """Return codes, each chosen anew while the others stay, input by input."""
    most = (1 << found.bits) - 1
    scales, zeros = found.scales.float(), found.zeros.float()
    codes = found.codes.float()
    values = found.values().T.contiguous()
    pull = hessian @ (target - values)  # [in_features, out_features], of each input's error with all errors
    for start in range(0, len(target), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(target)))
        own = hessian[block, block]
        moved = torch.zeros_like(target[block])
        near = pull[block].clone()
        for row in range(len(own)):
            place = start + row
            group = found.groups[place]
            grid = Grid(scales[group], zeros[group], most)
            chosen = grid.codes(values[place] + near[row] / own[row, row])
            change = grid.values(chosen) - values[place]
            codes[place], moved[row] = chosen, change
            near[row:].addr_(own[row:, row], change, alpha=-1)
        pull.addmm_(hessian[:, block], moved, alpha=-1)
    return codes.to(torch.uint8)


def _fitted_scales(found: Codes, target: Tensor, hessian: Tensor) -> Tensor:
    """Return the scales that suit each output's codes best, all groups at once: [num_groups, out_features] fp16.

    One that would be less than half or more than twice what it was stays: its group's codes say too little.
    """
    num_groups, num_outputs = found.scales.shape
    steps = found.codes.float() - found.zeros.float()[found.groups]  # [in_features, out_features]
    system, product = torch.empty(num_groups, num_groups, num_outputs), torch.empty_like(steps)
    for group, column in enumerate(system):
        inputs = found.groups == group
        torch.mul(hessian[:, inputs] @ steps[inputs], steps, out=product)
        column.zero_().index_add_(0, found.groups, product)
    right = torch.zeros(num_groups, num_outputs).index_add_(0, found.groups, (hessian @ target).mul_(steps))
    system = system.permute(2, 0, 1).contiguous()
    ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(dim=-1)
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None] + torch.finfo(torch.float32).tiny)
    scales = torch.linalg.solve(system, right.T).T
    before = found.scales.float()
    return representable(torch.where((scales > 0.5 * before) & (scales < 2 * before), scales, before)).half()
