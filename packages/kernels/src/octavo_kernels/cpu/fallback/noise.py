"""Philox4x32-10 with the counter's constant words kept as columns, and the Gumbel noise made from it."""

import torch
from torch import Tensor

from octavo_kernels.reference.noise import philox_words

_WORD = 0xFFFFFFFF


def philox(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] int64 with random words.

    Three counter words are constant in a row: as [rows, 1] they broadcast, and the first two rounds cost little.
    """
    num_columns = out.shape[1]
    blocks = torch.arange((num_columns + 3) // 4, device=out.device)[None, :]
    row_words = (sequence_index & _WORD, positions & _WORD, (positions >> 32) & _WORD)
    c0, c1, c2 = (word[:, None] for word in row_words)
    key = (seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]
    for column, words in enumerate(philox_words((c0, c1, c2, blocks), key)):
        part = out[:, column::4]
        part.copy_(words[:, : part.shape[1]])


def gumbel_noise(seeds: Tensor, sequence_index: Tensor, positions: Tensor, out: Tensor) -> None:
    """Fill out [rows, num_columns] fp32 with -log(-log((x + 0.5) / 2**32))."""
    words = torch.empty(out.shape, dtype=torch.int64, device=out.device)
    philox(seeds, sequence_index, positions, words)
    _gumbel(words, out)


def gumbel_noise_at(seeds: Tensor, sequence_index: Tensor, positions: Tensor, columns: Tensor, out: Tensor) -> None:
    """Fill out [num_values] fp32 with the noise of single columns; of each block of four words one is kept."""
    counter = (sequence_index & _WORD, positions & _WORD, (positions >> 32) & _WORD, columns // 4)
    words = torch.stack(philox_words(counter, (seeds & _WORD, (seeds >> 32) & _WORD)))
    _gumbel(words.gather(0, (columns % 4)[None])[0], out)


def _gumbel(words: Tensor, out: Tensor) -> None:
    noise = words.to(torch.float64).add_(0.5).mul_(2.0**-32).log_().neg_().to(torch.float32)
    torch.neg(noise.log_(), out=out)
