"""Rows rounded to 8 bits."""

import torch
from torch import Tensor

from octavo_kernels.reference._precision import widen


def quantize_rows(x: Tensor, group_size: int | None, out: Tensor, scales: Tensor) -> None:
    """Fill out with the codes, and scales."""
    limit = 127.0 if out.dtype == torch.int8 else torch.finfo(out.dtype).max
    size = x.shape[1] if group_size is None else group_size
    for group in range(scales.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        values = widen(x[:, inputs])
        scale = values.abs().amax(dim=1) / limit
        inverse = 1 / scale
        usable = (scale.isfinite() & inverse.isfinite())[:, None]
        codes = torch.where(usable, values * inverse[:, None], 0).clamp(-limit, limit)
        out[:, inputs] = (codes.round() if out.dtype == torch.int8 else codes).to(out.dtype)
        scales[:, group] = scale
