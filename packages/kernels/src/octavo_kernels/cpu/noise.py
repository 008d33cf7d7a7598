"""The noise of the `cpu` backend: native code, or batched torch where there is none."""

from torch import Tensor

from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import noise as fallback
from octavo_kernels.cpu.launch import launch
from octavo_kernels.cpu.load import library_for


def philox(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] int64 with random words."""
    if library_for("philox") is None:
        return fallback.philox(seeds, sequence_index, positions, out)
    return _launch((seeds, sequence_index, positions), out, words=True)


def gumbel_noise(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] fp32 with noise."""
    if library_for("gumbel_noise") is None:
        return fallback.gumbel_noise(seeds, sequence_index, positions, out)
    return _launch((seeds, sequence_index, positions), out, words=False)


def gumbel_noise_at(seeds: Tensor, sequence_index: Tensor, positions: Tensor, columns: Tensor, out: Tensor) -> None:
    """Fill out [num_values] fp32 with the noise of single columns."""
    if library_for("gumbel_noise_at") is None:
        return fallback.gumbel_noise_at(seeds, sequence_index, positions, columns, out)
    keys = [tensor.contiguous() for tensor in (seeds, sequence_index, positions, columns)]
    args = abi.NoiseAtArgs(*(key.data_ptr() for key in keys), out.data_ptr())
    return launch(abi.OpKind.NOISE_AT, args, len(out), *keys, out)


def _launch(row_keys: tuple[Tensor, Tensor, Tensor], out: Tensor, *, words: bool) -> None:
    keys = [tensor.contiguous() for tensor in row_keys]
    args = abi.NoiseArgs(*(key.data_ptr() for key in keys), out.data_ptr(), out.shape[1], words)
    launch(abi.OpKind.NOISE, args, len(out), *keys, out)
