"""Counter-based noise: a pure function of seed, sequence, position and column, equal in every backend."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def philox(seeds: Tensor, sequence_index: Tensor, positions: Tensor, num_columns: int) -> Tensor:
    """Return 32 random bits per column from Philox4x32-10 (Salmon et al., SC'11, doi 10.1145/2063384.2063405).

    Row r, column c is word c % 4 of the block with

        key     = (low 32 bits of seeds[r], high 32 bits of seeds[r])
        counter = (sequence_index[r], low 32 bits of positions[r], high 32 bits of positions[r], c // 4)

    in the order of the published test vectors, so any slice of columns can be made without the rest.

    Args:
        seeds: [rows] int64, taken as 64 bits.
        sequence_index: [rows] int64, taken modulo 2**32.
        positions: [rows] int64, taken as 64 bits.
        num_columns: how many columns, at least 0.

    Returns:
        [rows, num_columns] int64, each value in 0 .. 2**32 - 1.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    return _noise("philox", seeds, sequence_index, positions, num_columns, torch.int64)


def gumbel_noise(seeds: Tensor, sequence_index: Tensor, positions: Tensor, num_columns: int) -> Tensor:
    """Return standard Gumbel noise: -log(-log(u)), u = (x + 0.5) / 2**32 with x from `philox`.

    u is never 0 or 1, so every value is finite: between -3.14 and 22.88. The tail near u = 1 is accurate to fp32, since
    the inner logarithm is taken in fp64. arg-max of logits + noise samples from softmax(logits).

    Args:
        seeds: [rows] int64.
        sequence_index: [rows] int64.
        positions: [rows] int64.
        num_columns: how many columns, at least 0.

    Returns:
        [rows, num_columns] fp32.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    return _noise("gumbel_noise", seeds, sequence_index, positions, num_columns, torch.float32)


def gumbel_noise_at(seeds: Tensor, sequence_index: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Return single values of `gumbel_noise`, bit for bit, for where few columns of a row matter.

    Value i is what `gumbel_noise` gives in column columns[i] of a row of seeds[i], sequence_index[i], positions[i].

    Args:
        seeds: [num_values] int64.
        sequence_index: [num_values] int64.
        positions: [num_values] int64.
        columns: [num_values] int64, not negative.

    Returns:
        [num_values] fp32.

    Raises:
        ShapeError, DtypeError, DeviceError: an argument does not fit.

    """
    op = "gumbel_noise_at"
    device = _keys(op, seeds, sequence_index, positions)
    _check.same_device(op, seeds=seeds, columns=columns)
    _check.shape(op, "columns", columns, seeds.shape)
    _check.dtype(op, "columns", columns, torch.int64)
    out = torch.empty(seeds.shape, dtype=torch.float32, device=device)
    if out.numel():
        implementation(op, device)(seeds, sequence_index, positions, columns, out)
    return out


def _noise(
    op: str, seeds: Tensor, sequence_index: Tensor, positions: Tensor, num_columns: int, dtype: torch.dtype
) -> Tensor:
    device = _keys(op, seeds, sequence_index, positions)
    _check.option(op, "num_columns", num_columns, num_columns >= 0, "at least 0")
    out = torch.empty((seeds.shape[0], num_columns), dtype=dtype, device=device)
    if out.numel():
        implementation(op, device)(seeds, sequence_index, positions, out)
    return out


def _keys(op: str, seeds: Tensor, sequence_index: Tensor, positions: Tensor) -> torch.device:
    """Check what noise is keyed by; return its device."""
    device = _check.same_device(op, seeds=seeds, sequence_index=sequence_index, positions=positions)
    _check.rank(op, "seeds", seeds, ("rows",))
    _check.shape(op, "sequence_index", sequence_index, seeds.shape)
    _check.shape(op, "positions", positions, seeds.shape)
    for name, tensor in (("seeds", seeds), ("sequence_index", sequence_index), ("positions", positions)):
        _check.dtype(op, name, tensor, torch.int64)
    return device
