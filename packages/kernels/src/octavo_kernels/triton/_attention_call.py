"""AttentionCall, the tensors and options of one call as attention kernels take them, and Tile, the size of work."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels._split_workspace import SPLIT_ROWS
from octavo_kernels.triton._launch import interpreted, next_power_of_2
from octavo_kernels.triton._tuned import tuned, with_config
from octavo_kernels.tuning import Config

TUNABLE = ("num_warps", "num_stages")
"""What a tuned configuration says of a tile, but for batch-invariant calls; the order of sums depends on the rest."""


class Tile(NamedTuple):
    """What a program takes at once: rows (pairs of a token and a head of the group), keys, warps, stages of loads.

    The order of sums depends on `keys`, and on a GPU perhaps on the products' instruction, which is Hopper's wgmma from
    64 rows on and mma.sync below: batch-invariant tiles have 64 rows or more, and keys by dtype and head_dim alone.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of an attention kernel; nobody writes it after construction.

    k, v: [num_blocks, num_kv_heads, block_size, head_dim]; without a block_table, one block with all keys. key_lens:
    [num_seqs] lengths with a block_table, [num_seqs + 1] starts without. The rest is as in `paged_attention`, but
    for out, which may be fp32 whatever q's dtype is. config: what tiles have instead of what the tuning cache says,
    while configurations are measured.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    query_start_loc: Tensor
    key_lens: Tensor
    options: AttentionOptions
    out: Tensor
    lse: Tensor | None
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    config: Config | None = None

    @property
    def num_seqs(self) -> int:
        """Number of sequences."""
        return self.query_start_loc.shape[0] - 1

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    def prefill_tile(self, max_query_len: int) -> Tile:
        """Return the tile for long queries; its height follows max_query_len unless the call is batch-invariant."""
        block_d, least = self._block_d(), next_power_of_2(self.group)
        num_rows = max_query_len * self.group
        if self.q.dtype == torch.float32 or self.options.batch_invariant:
            return self._invariant_tile(128, self._num_stages(3))
        if num_rows <= SPLIT_ROWS or torch.version.hip is not None:
            small = max(least, 16 if num_rows <= 16 else 64)
            return self._tuned("prefill", Tile(small, self._num_keys(), 4, self._num_stages(3)))
        large = max(least, 64 if block_d > 128 else 128)
        return self._tuned("prefill", Tile(large, self._num_keys(), 8, self._num_stages(3)))

    def split_tile(self, max_query_len: int) -> Tile:
        """Return the tile for short queries, whose time goes into reading keys."""
        if self.q.dtype == torch.float32 or self.options.batch_invariant:
            return self._invariant_tile(SPLIT_ROWS, self._num_stages(5))
        num_rows = max(16, min(SPLIT_ROWS, next_power_of_2(max_query_len * self.group)))
        num_warps = 8 if self._block_d() > 128 else 4
        num_rows = max(next_power_of_2(self.group), num_rows)
        return self._tuned("decode", Tile(num_rows, self._num_keys(), num_warps, self._num_stages(5)))

    def _tuned(self, kind: str, default: Tile) -> Tile:
        if self.config is not None:
            return with_config("paged_attention", default, TUNABLE, self.config)
        return tuned(
            "paged_attention", default, TUNABLE, rows=default.rows, shape=self.tuning_shape(kind), dtype=self.q.dtype,
            device=self.q.device,
        )  # fmt: skip

    def tuning_shape(self, kind: str) -> str:
        """Return what distinguishes calls in the tuning cache; kind: "decode" for `split_tile`, "prefill" else."""
        return f"{kind} {self._block_d()}"

    def _invariant_tile(self, num_rows: int, num_stages: int) -> Tile:
        """Return a tile of about num_rows rows: sums have one order in all of them, four warps to 64 rows."""
        block_d, least = self._block_d(), next_power_of_2(self.group)
        if self.q.dtype == torch.float32:
            return Tile(max(least, 64), 32, 4 if block_d < 128 else 8, 2)
        if block_d > 128 or self._late_scale():
            # Registers: the state of a row is long, or scores take more of them.
            return Tile(max(least, 64), 32, 8, num_stages)
        num_rows = max(least, 64 if torch.version.hip is not None else num_rows)
        return Tile(num_rows, self._num_keys(), max(4, num_rows // 16), num_stages)

    def _num_keys(self) -> int:
        """Return keys per tile; for 16-bit queries those that torch's FlexAttention has for the H100."""
        return {64: 128, 128: 64, 256: 32}[max(self._block_d(), 64)]

    def _num_stages(self, for_hopper: int) -> int:
        """Return how many tiles the loop over keys spans: block ids come before keys, and keys before products."""
        return 2 if torch.version.hip is not None else for_hopper

    def inputs(self) -> tuple[object, ...]:
        """Return what kernels read, in the order of their first parameters."""
        options, table, k_scale, v_scale = self.options, self.block_table, self.k_scale, self.v_scale
        return (
            self.q, self.k, self.v, self.query_start_loc, self.key_lens, table, options.alibi_slopes, k_scale, v_scale,
            options.scale if self._late_scale() else options.scale * math.log2(math.e),
            options.soft_cap or 0.0, options.window or 0, self.num_seqs,
            *self.q.stride()[:2], *self.k.stride()[:3], *self.v.stride()[:3], 0 if table is None else table.stride(0),
            *((0, 0, 0) if k_scale is None else k_scale.stride()),
            *((0, 0, 0) if v_scale is None else v_scale.stride()),
        )  # fmt: skip

    def results(self) -> tuple[object, ...]:
        """Return where kernels store results, in the order of their parameters, and the sinks that end them."""
        lse_strides = (0, 0) if self.lse is None else self.lse.stride()
        return (self.out, self.lse, self.options.sinks, *self.out.stride()[:2], *lse_strides)

    def constants(self, tile: Tile) -> dict[str, object]:
        """Return the compile-time arguments that all attention kernels take."""
        options = self.options
        return {
            "GROUP": self.group,
            "HEAD_DIM": self.q.shape[2],
            "BLOCK_SIZE": 1 if self.block_table is None else self.k.shape[2],
            "BLOCK_M": tile.rows,
            "BLOCK_Q": tile.rows // self.group,
            "BLOCK_N": tile.keys,
            "BLOCK_D": self._block_d(),
            "CAUSAL": options.causal,
            "WINDOWED": options.window is not None,
            "CAPPED": options.soft_cap is not None,
            "LATE_SCALE": self._late_scale(),
            "ALIKE": self.k.stride() == self.v.stride(),
            "CHUNKED": options.batch_invariant,
            "WIDE_DOT": interpreted() and self.q.dtype == torch.bfloat16,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def _block_d(self) -> int:
        return max(16, next_power_of_2(self.q.shape[2]))

    def _late_scale(self) -> bool:
        """Whether scores stay in their own base until they are complete: caps and slopes are not in base 2."""
        return self.options.soft_cap is not None or self.options.alibi_slopes is not None
