"""Philox4x32-10 on int64 tensors that hold 32-bit words, and the Gumbel noise made from it."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def philox(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] int64 with random words."""
    num_columns = out.shape[1]
    blocks = torch.arange((num_columns + 3) // 4, device=out.device)
    row_words = torch.stack([_low(sequence_index), _low(positions), _high(positions)])
    c0, c1, c2 = row_words[:, :, None].expand(-1, -1, blocks.shape[0])
    key = _low(seeds)[:, None], _high(seeds)[:, None]
    words = philox_words((c0, c1, c2, blocks.expand_as(c0)), key)
    out.copy_(torch.stack(words, dim=-1).flatten(-2)[:, :num_columns])


def gumbel_noise(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] fp32 with -log(-log((x + 0.5) / 2**32))."""
    words = torch.empty(out.shape, dtype=torch.int64, device=out.device)
    philox(seeds, sequence_index, positions, words)
    uniform = (words.to(torch.float64) + 0.5) * 2.0**-32
    out.copy_(-torch.log(-torch.log(uniform)))


def gumbel_noise_at(seeds: Tensor, sequence_index: Tensor, positions: Tensor, columns: Tensor, out: Tensor) -> None:
    """Fill out [num_values] fp32 with the noise of single columns: a full row each, of which one value is kept."""
    for i, column in enumerate(columns.tolist()):
        row = torch.empty((1, column + 1), dtype=torch.float32, device=out.device)
        gumbel_noise(seeds[i : i + 1], sequence_index[i : i + 1], positions[i : i + 1], row)
        out[i] = row[0, -1]


def philox_words(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10 for four counter words and two key words, all int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits of a 32 by 32 product.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(second) ^ c1 ^ k0, _low(second), _high(first) ^ c3 ^ k1, _low(first)
        k0, k1 = _low(k0 + _WEYL[0]), _low(k1 + _WEYL[1])
    return c0, c1, c2, c3


def _low(x: Tensor) -> Tensor:
    return x & _WORD


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _WORD
