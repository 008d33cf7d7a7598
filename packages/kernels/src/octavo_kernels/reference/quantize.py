"""Rows rounded to 8 bits."""

from torch import Tensor

from octavo_kernels._codes import CodeOutput
from octavo_kernels.reference._codes import write_codes


def quantize_rows(x: Tensor, output: CodeOutput) -> None:
    """Fill the output with the codes and the scales of x."""
    write_codes(x, output)
