"""Inputs of attention over cache blocks, and tolerances of results; public, so that other packages' tests use them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PagedInputs",
    "Tolerance",
    "assert_close",
    "assert_codes",
    "make_paged_inputs",
    "random_lengths",
    "tolerance",
]

_NAN = float("nan")


class Tolerance(NamedTuple):
    """How far a result may be from the reference: |a - b| <= atol + rtol * |b|."""

    rtol: float
    atol: float


_TOLERANCES = MappingProxyType(
    {
        torch.float64: Tolerance(1e-10, 1e-10),
        torch.float32: Tolerance(1e-5, 1e-5),
        torch.float16: Tolerance(2e-3, 2e-3),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2),
    }
)


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the tolerance for results of a dtype against a reference in fp64.

    Raises: KeyError (a dtype that no op returns).
    """
    return _TOLERANCES[dtype]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that two tensors agree within the tolerance of `dtype`, actual's own by default.

    Raises: AssertionError.
    """
    rtol, atol = tolerance(dtype or actual.dtype)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_codes(codes: Tensor, scales: Tensor, expected: Tensor) -> None:
    """Assert that codes of 8 bits times their scales are as near to a result as such codes can be.

    Args:
        codes: [..., size] int8 or float8_e4m3fn.
        scales: [..., num_groups] fp32, each for 128 elements where there are several, or [1, 1] for all.
        expected: [..., size], the result in full.

    Raises: AssertionError.
    """
    size, num_groups = codes.shape[-1], scales.shape[-1]
    steps = scales.double()
    if num_groups > 1:
        steps = steps.repeat_interleave(128, dim=-1)[..., :size]
    values = codes.double() * steps
    # Half a step of whole numbers; of e4m3 a sixteenth, or half of its least step; and what fp32 leaves open, at a tie
    # or where a result near 0 is the difference of larger terms.
    spare = 1e-4 * expected.double().abs() + 1e-5 * steps + 1e-6
    coarse = steps / 2 if codes.dtype == torch.int8 else torch.maximum(expected.double().abs() / 16, steps * 2.0**-10)
    allowed = coarse + spare
    error = (values - expected.double()).abs()
    assert bool((error <= allowed).all()), f"{int((error > allowed).sum())} codes are off, by up to {error.amax()}"


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """The tensors of one `paged_attention` call, and what they were made from.

    keys, values: per sequence [seq_len, num_kv_heads, head_dim], what the cache holds for it.
    slot_mapping: [num_tokens] int64, the slots of the new tokens, -1 for padding rows.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    slot_mapping: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def scale(self) -> float:
        """The usual factor on scores, head_dim ** -0.5."""
        return float(self.q.shape[-1] ** -0.5)

    @property
    def num_rows(self) -> int:
        """Rows of q that belong to a sequence; the rest is padding."""
        return int(self.query_start_loc[-1])

    def arguments(self) -> dict[str, Any]:
        """Return the required arguments of `paged_attention`, by name."""
        names = ("q", "k_cache", "v_cache", "query_start_loc", "seq_lens", "block_table", "max_query_len", "scale")
        return {name: getattr(self, name) for name in names}

    def to(self, dtype: torch.dtype) -> "PagedInputs":
        """Return the same inputs with floating tensors in another dtype; the cache keeps its layout."""
        return PagedInputs(
            self.q.to(dtype),
            self.k_cache.to(dtype),
            self.v_cache.to(dtype),
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.max_query_len,
            self.slot_mapping,
            tuple(key.to(dtype) for key in self.keys),
            tuple(value.to(dtype) for value in self.values),
        )


def random_lengths(count: int, block_size: int, longest: int, *, seed: int) -> list[int]:
    """Return lengths in 1 .. longest, with those around multiples of the block size among them."""
    source = random.Random(seed)
    edges = [length for length in (1, block_size - 1, block_size, block_size + 1, longest) if 1 <= length <= longest]
    lengths = [edges[index] if index < len(edges) else source.randint(1, longest) for index in range(count)]
    source.shuffle(lengths)
    return lengths


def make_paged_inputs(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: Literal["hnd", "nhd"] = "hnd",
    num_padding_rows: int = 0,
    seed: int = 0,
) -> PagedInputs:
    """Make random inputs of `paged_attention` that punish careless kernels.

    Blocks are permuted, K and V are views of one allocation, block 0 and every unwritten slot hold NaN, and table
    entries past a sequence's end are ids that do not exist.

    Args:
        query_lens: new tokens per sequence, 0 or more.
        seq_lens: tokens per sequence, the new ones included.
        num_heads: query heads.
        num_kv_heads: key heads.
        head_dim: size of a head.
        block_size: slots per block.
        dtype: of q and the cache.
        device: where the tensors are.
        layout: order in memory, head before offset ("hnd") or after ("nhd"); the shape is the same.
        num_padding_rows: rows of q behind the last sequence's.
        seed: equal seeds give equal inputs.

    Returns:
        PagedInputs.

    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    counts = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(counts) + 2
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    table = torch.full((len(seq_lens), max(counts, default=0) + 2), num_blocks + 7, dtype=torch.int32)
    allocation = _allocate(num_blocks, num_kv_heads, block_size, head_dim, dtype, layout)
    keys = tuple(normal(seq_len, num_kv_heads, head_dim) for seq_len in seq_lens)
    values = tuple(normal(seq_len, num_kv_heads, head_dim) for seq_len in seq_lens)
    slots: list[int] = []
    for sequence, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        block_ids = [order.pop() for _ in range(counts[sequence])]
        table[sequence, : len(block_ids)] = torch.tensor(block_ids, dtype=torch.int32)
        for position in range(seq_len):
            block_id, offset = block_ids[position // block_size], position % block_size
            allocation[block_id, 0, :, offset] = keys[sequence][position]
            allocation[block_id, 1, :, offset] = values[sequence][position]
            if position >= seq_len - query_len:
                slots.append(block_id * block_size + offset)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    q = normal(sum(query_lens) + num_padding_rows, num_heads, head_dim)
    slot_mapping = torch.tensor(slots + [-1] * num_padding_rows, dtype=torch.int64)
    allocation = allocation.to(device)
    return PagedInputs(
        q.to(device),
        allocation[:, 0],
        allocation[:, 1],
        starts.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        table.to(device),
        max(query_lens, default=0),
        slot_mapping.to(device),
        tuple(key.to(device) for key in keys),
        tuple(value.to(device) for value in values),
    )


def _allocate(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, layout: str
) -> Tensor:
    """Return NaN in shape [num_blocks, 2, num_kv_heads, block_size, head_dim], laid out as asked."""
    if layout == "hnd":
        return torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), _NAN, dtype=dtype)
    return torch.full((num_blocks, 2, block_size, num_kv_heads, head_dim), _NAN, dtype=dtype).transpose(2, 3)
