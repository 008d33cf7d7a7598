"""How the reference rounds to 8 bits."""

import torch
from torch import Tensor

from octavo_kernels._codes import LARGEST_CODE, CodeOutput


def write_codes(values: Tensor, output: CodeOutput) -> None:
    """Fill the output with values [..., size], a group at a time."""
    for group, elements in enumerate(torch.split(values.float(), output.group_size, dim=-1)):
        start = group * output.group_size
        codes = output.codes[..., start : start + elements.shape[-1]]
        if output.is_fixed:
            codes.copy_(codes_of(elements, output.scales.view(()), codes.dtype))
            continue
        scales = scales_of(elements, codes.dtype)
        output.scales[..., group] = scales
        codes.copy_(codes_of(elements, scales[..., None], codes.dtype))


def scales_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales [...] of vectors [..., size] fp32."""
    return values.abs().amax(dim=-1) / LARGEST_CODE[dtype]


def codes_of(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values fp32 over scales, rounded to a dtype of codes."""
    inverse = 1 / scales
    usable = scales.isfinite() & inverse.isfinite()
    largest = LARGEST_CODE[dtype]
    codes = torch.where(usable, values * inverse, 0).clamp(-largest, largest)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype)
