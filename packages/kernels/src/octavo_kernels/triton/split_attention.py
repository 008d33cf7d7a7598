"""Attention of short queries in Triton: keys are dealt out to programs in pieces, and partial states are joined after.

Three launches, none of which needs a length on the host, and all of whose grids are constants of the call's shapes and
the device: `_plan` (one program) counts chunks of keys and deals them out; `_split` (as many programs as fit the device
at once) walks pieces of work, each a run of chunks of a sequence for one key head; `_join_parts` joins what they leave.
Flash-Decoding in form; the plan on the device is LightLLM's idea.

The plan is int32 in the workspace, of num_seqs = S sequences:

    [0 .. S]          pieces of all earlier sequences, and of all at the end
    [S + 1 .. 2S]     a sequence's first slot in the workspace
    [2S + 1 .. 3S]    its number of slots; 0 where it is not done here
    [3S + 1]          chunks per piece

and a slot holds the states of all rows of a sequence: [num_kv_heads, max_query_len * group, head_dim] fp32 sums of
values, and apart from these [num_kv_heads, max_query_len * group, 2] fp32 maxima and sums of weights. Batch-invariant
calls fill a slot per chunk, else per piece. Sequences that find no slots are left to the kernel for long queries, which
joins chunks in the same order: fewer slots cost time, and no bit.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals; conditions on these stand alone.

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._split_workspace import cut_workspace, num_chunks
from octavo_kernels.triton._attend import (
    chunk_of,
    chunk_start,
    empty_state,
    finish,
    join,
    step,
)
from octavo_kernels.triton._attention_call import AttentionCall
from octavo_kernels.triton._launch import interpreted, next_power_of_2, num_resident_programs

# Work is cut so that each program gets about this many pieces: few to join, enough to even out.
_PIECES_PER_PROGRAM = 4


class Split(NamedTuple):
    """What `split_attention` has done: the sequences that have slots in the plan; all with few queries if complete."""

    plan: Tensor
    complete: bool


class Cut(NamedTuple):
    """A call's keys dealt out; see the file's docstring for what the tensors hold.

    num_rows: of a slot. max_query_len: of the sequences that may have slots. width: tiles of rows that read the same
    piece. num_programs: as many as walk over the pieces. most_slots: as many as all sequences could need.
    """

    plan: Tensor
    parts: Tensor
    sums: Tensor
    num_rows: int
    max_query_len: int
    width: int
    num_programs: int
    most_slots: int

    @property
    def split(self) -> Split:
        """What has been done once the pieces are walked over and joined."""
        return Split(self.plan, self.sums.numel() // (2 * self.num_rows) >= self.most_slots)


def split_attention(call: AttentionCall, max_query_len: int, workspace: Tensor | None) -> Split:
    """Do the sequences of a call with at most max_query_len queries that find slots; leave the others' rows alone.

    The workspace is uint8 of any size that `cut_workspace` accepts; allocated when None.
    """
    tile = call.split_tile(max_query_len)
    cut = cut_keys(call, max_query_len, workspace, tile.rows)
    _split[(cut.num_programs,)](
        *call.inputs(), cut.plan, cut.parts, cut.sums, cut.num_rows, call.q.shape[1], cut.width, **call.constants(tile)
    )
    join_parts(call, cut)
    return cut.split


def cut_keys(call: AttentionCall, max_query_len: int, workspace: Tensor | None, tile_rows: int) -> Cut:
    """Deal out the keys of a call's sequences with at most max_query_len queries, for tiles of tile_rows rows."""
    num_query_tiles = -(-max_query_len // (tile_rows // call.group))
    num_rows, num_seqs = max_query_len * call.q.shape[1], call.num_seqs
    width = call.k.shape[1] * num_query_tiles
    num_programs = num_resident_programs(call.q.device)
    assert call.block_table is not None
    most_slots = num_seqs * num_chunks(call.block_table.shape[1] * call.k.shape[2])
    plan, parts, sums = cut_workspace(
        "paged_attention", workspace, num_seqs, most_slots, num_rows, call.q.shape[2], call.q.device
    )
    options = call.options
    _plan[(1,)](
        call.query_start_loc, call.key_lens, plan, num_seqs, options.window or 0, max_query_len,
        sums.numel() // (2 * num_rows), width, _PIECES_PER_PROGRAM * num_programs,
        WINDOWED=options.window is not None, CHUNKED=options.batch_invariant,
        BLOCK=min(1024, next_power_of_2(num_seqs)), num_warps=4,
    )  # fmt: skip
    return Cut(plan, parts, sums, num_rows, max_query_len, width, num_programs, most_slots)


def join_parts(call: AttentionCall, cut: Cut) -> None:
    """Join the states that pieces have left, and store the results."""
    # Few rows and many loads under way; in the interpreter wide tiles, where each operation costs the same.
    rows, ahead = (64, 1) if interpreted() else (1, 16)
    head_dim = call.q.shape[2]
    _join_parts[(call.num_seqs * -(-cut.max_query_len * call.group // rows), call.k.shape[1])](
        *call.results(), call.query_start_loc, cut.plan, cut.parts, cut.sums, call.num_seqs, cut.num_rows,
        cut.max_query_len, GROUP=call.group, HEAD_DIM=head_dim, BLOCK_D=max(16, next_power_of_2(head_dim)), ROWS=rows,
        AHEAD=ahead, num_warps=1,
    )  # fmt: skip


@triton.jit
def _first_chunk(seq_len, query_len, window, WINDOWED: tl.constexpr):
    """Return the first chunk that any query of a sequence sees."""
    lowest = seq_len * 0
    if WINDOWED:
        lowest = tl.maximum(0, seq_len - query_len - window + 1)
    return chunk_of(lowest)


@triton.jit
def _count_chunks(
    query_start_loc, seq_lens, sequences, num_seqs, window, max_query_len, WINDOWED: tl.constexpr
):  # fmt: skip
    """Return how many chunks sequences have here: 0 without queries or with too many, else 1 at least."""
    known = sequences < num_seqs
    start = tl.load(query_start_loc + sequences, mask=known, other=0)
    query_len = tl.load(query_start_loc + sequences + 1, mask=known, other=0) - start
    seq_len = tl.load(seq_lens + sequences, mask=known, other=0)
    last = chunk_of(tl.maximum(seq_len - 1, 0))
    count = last + 1 - _first_chunk(seq_len, query_len, window, WINDOWED)
    return tl.where((query_len > 0) & (query_len <= max_query_len), count, 0)


@triton.jit
def _plan(
    query_start_loc, seq_lens, plan, num_seqs, window, max_query_len, num_slots, width, wanted_pieces,
    WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Deal out the chunks of all sequences, for `width` programs' rows each; see the file's docstring."""
    lanes = tl.arange(0, BLOCK)
    total = 0
    for first in range(0, num_seqs, BLOCK):
        counts = _count_chunks(
            query_start_loc, seq_lens, first + lanes, num_seqs, window, max_query_len, WINDOWED
        )  # fmt: skip
        total += tl.sum(counts, 0)
    run = tl.maximum(1, (total * width + wanted_pieces - 1) // wanted_pieces)
    tl.store(plan, 0)
    tl.store(plan + 3 * num_seqs + 1, run)
    pieces_before = 0
    slots_before = 0
    for first in range(0, num_seqs, BLOCK):
        sequences = first + lanes
        counts = _count_chunks(
            query_start_loc, seq_lens, sequences, num_seqs, window, max_query_len, WINDOWED
        )  # fmt: skip
        pieces = (counts + run - 1) // run
        slots = counts if CHUNKED else pieces
        slot_ends = slots_before + tl.cumsum(slots, 0)
        slots_before += tl.sum(slots, 0)
        fits = slot_ends <= num_slots
        pieces = tl.where(fits, pieces, 0)
        known = sequences < num_seqs
        tl.store(plan + 1 + sequences, pieces_before + tl.cumsum(pieces, 0), mask=known)
        tl.store(plan + num_seqs + 1 + sequences, slot_ends - slots, mask=known)
        tl.store(plan + 2 * num_seqs + 1 + sequences, tl.where(fits, slots, 0), mask=known)
        pieces_before += tl.sum(pieces, 0)


@triton.jit
def _find_piece(plan, piece, num_seqs):
    """Return the last sequence that has no more than `piece` pieces before it: the one whose piece it is."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(plan + middle) <= piece:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _keep_part(
    accumulator, row_max, row_sum, parts, sums, first_row, num_live,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store a tile's state at rows that lie side by side, of which the first num_live count."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    live = rows < num_live
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(parts + first_row * HEAD_DIM + (rows[:, None] * HEAD_DIM + dims[None, :]), accumulator, mask=inside)
    tl.store(sums + first_row * 2 + rows * 2, row_max, mask=live)
    tl.store(sums + first_row * 2 + rows * 2 + 1, row_sum, mask=live)


@triton.jit
def _load_part(
    parts, sums, first_row, num_live, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return a state stored by _keep_part, an empty one for rows that do not count."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    live = rows < num_live
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(parts + first_row * HEAD_DIM + (rows[:, None] * HEAD_DIM + dims[None, :]), mask=inside, other=0.0)
    part_max = tl.load(sums + first_row * 2 + rows * 2, mask=live, other=float("-inf"))
    return part, part_max, tl.load(sums + first_row * 2 + rows * 2 + 1, mask=live, other=0.0)


@triton.jit
def _split(
    q_ptr, k_ptr, v_ptr, query_start_loc, key_lens, block_table, slopes_ptr, k_scale_ptr, v_scale_ptr,
    factor, soft_cap, window, num_seqs, q_stride_t, q_stride_h,
    k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o, table_stride,
    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
    plan, parts, sums, num_rows, num_heads, width,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, LATE_SCALE: tl.constexpr,
    ALIKE: tl.constexpr, CHUNKED: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    """Walk over pieces of work; a tile's rows are those of `triton.attention`."""
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    num_kv_heads = num_heads // GROUP
    num_pieces = tl.load(plan + num_seqs) * width
    for work in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        piece = work // width
        kv_head = work % width % num_kv_heads
        first_query = work % width // num_kv_heads * BLOCK_Q
        sequence = _find_piece(plan, piece, num_seqs)
        start = tl.load(query_start_loc + sequence)
        query_len = tl.load(query_start_loc + sequence + 1) - start
        seq_len = tl.load(key_lens + sequence)
        table_row = block_table + sequence.to(tl.int64) * table_stride
        slot = tl.load(plan + num_seqs + 1 + sequence)
        run = tl.load(plan + 3 * num_seqs + 1)

        queries = first_query + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        num_live = tl.minimum(BLOCK_Q, query_len - first_query) * GROUP
        live = rows < num_live
        tokens = (start + queries).to(tl.int64)
        q_rows = tokens * q_stride_t + heads * q_stride_h
        inside = live[:, None] & (dims < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=inside, other=0.0)
        if WIDE_DOT:
            q = q.to(tl.float32)
        slopes = None
        if slopes_ptr is not None:
            slopes = tl.load(slopes_ptr + heads, mask=live, other=0.0)

        offset = seq_len - query_len
        lowest = 0
        if WINDOWED:
            lowest = tl.maximum(0, offset - window + 1)
        first_chunk = _first_chunk(seq_len, query_len, window, WINDOWED)
        chunk = first_chunk + (piece - tl.load(plan + sequence)) * run
        end_chunk = tl.minimum(chunk + run, chunk_of(tl.maximum(seq_len - 1, 0)) + 1)
        if first_query >= query_len:
            end_chunk = chunk
        # A part is a chunk, or the whole run.
        part_chunks = 1
        place = slot + chunk - first_chunk
        if not CHUNKED:
            part_chunks = run
            place = slot + piece - tl.load(plan + sequence)
        first_row = kv_head * (num_rows // num_kv_heads) + first_query * GROUP  # of a slot
        for part in range(chunk, end_chunk, part_chunks):
            first_key = tl.maximum(chunk_start(part), lowest // BLOCK_N * BLOCK_N)
            stop = tl.minimum(chunk_start(part + part_chunks), seq_len)
            accumulator, row_max, row_sum = empty_state(BLOCK_M, BLOCK_D)
            for key in range(first_key, stop, BLOCK_N):
                accumulator, row_max, row_sum = step(
                    accumulator, row_max, row_sum, q, key, 0, lowest, seq_len, offset + queries, slopes, kv_head,
                    k_ptr, v_ptr, table_row, k_scale_ptr, v_scale_ptr, factor, soft_cap, window,
                    k_stride_b, k_stride_h, k_stride_o, v_stride_b, v_stride_h, v_stride_o,
                    ks_stride_b, ks_stride_h, ks_stride_o, vs_stride_b, vs_stride_h, vs_stride_o,
                    HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, True, CAUSAL, WINDOWED, CAPPED, LATE_SCALE, ALIKE, True,
                )  # fmt: skip
            _keep_part(
                accumulator, row_max, row_sum, parts, sums, place.to(tl.int64) * num_rows + first_row, num_live,
                BLOCK_M, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            place += 1


@triton.jit
def _join_parts(
    out_ptr, lse_ptr, sinks_ptr, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    query_start_loc, plan, parts, sums, num_seqs, num_rows, max_query_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Join the states of some rows of one key head in the order of their positions, and store the results."""
    tiles_per_sequence = (max_query_len * GROUP + ROWS - 1) // ROWS
    sequence = tl.program_id(0) // tiles_per_sequence
    first_row = tl.program_id(0) % tiles_per_sequence * ROWS
    kv_head = tl.program_id(1)
    start = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - start
    num_slots = tl.load(plan + 2 * num_seqs + 1 + sequence)
    num_live = query_len * GROUP - first_row
    if (num_live <= 0) | (num_slots == 0):
        return
    first_slot = tl.load(plan + num_seqs + 1 + sequence).to(tl.int64)
    row_in_slot = kv_head * max_query_len * GROUP + first_row
    accumulator, row_max, row_sum = empty_state(ROWS, BLOCK_D)
    for first in range(0, num_slots, AHEAD):
        # Unrolled, so that many loads are under way at once.
        for ahead in tl.static_range(AHEAD):
            given = tl.where(first + ahead < num_slots, num_live, 0)
            part, part_max, part_sum = _load_part(
                parts, sums, (first_slot + first + ahead) * num_rows + row_in_slot, given, ROWS, HEAD_DIM, BLOCK_D
            )  # fmt: skip
            accumulator, row_max, row_sum = join(accumulator, row_max, row_sum, part, part_max, part_sum)
    rows = first_row + tl.arange(0, ROWS)
    heads = kv_head * GROUP + rows % GROUP
    tokens = (start + rows // GROUP).to(tl.int64)
    live = tl.arange(0, ROWS) < num_live
    out_rows = tokens * out_stride_t + heads * out_stride_h
    lse_rows = tokens * lse_stride_t + heads * lse_stride_h
    finish(
        accumulator, row_max, row_sum, sinks_ptr, heads, out_ptr, lse_ptr, out_rows, lse_rows, live, HEAD_DIM, BLOCK_D
    )  # fmt: skip
