"""rejection_sample in Triton: a program owns a sequence (many in the interpreter) and judges its drafts in turn."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels.triton._launch import next_power_of_2, rows_of_a_program
from octavo_kernels.triton.filters import COLUMNS, load_logits
from octavo_kernels.triton.logprobs import largest_and_mass
from octavo_kernels.triton.noise import gumbel_tile
from octavo_kernels.triton.sampling import first_largest

_LAST_RESORT = tl.constexpr(1000.0)  # tokens without a residual come behind all that have one


def rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    query_start_loc: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    sequence_index: Tensor,
    positions: Tensor,
    draft_logits: Tensor | None,
    token_ids: Tensor,
    num_accepted: Tensor,
) -> None:
    """Fill token_ids and num_accepted."""
    num_seqs, vocab_size = len(temperature), target_logits.shape[1]
    columns = min(COLUMNS, max(4, next_power_of_2(vocab_size)))
    rows = rows_of_a_program(num_seqs, columns)
    values = (draft_token_ids, query_start_loc, temperature, seeds, sequence_index, positions)
    _judge[(triton.cdiv(num_seqs, rows),)](
        target_logits, draft_logits, *values, token_ids, num_accepted, num_seqs, vocab_size, token_ids.shape[1],
        target_logits.stride(0), 0 if draft_logits is None else draft_logits.stride(0),
        *(value.stride(0) for value in values), ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip


@triton.jit
def _uniform(seeds, sequence_index, positions):
    """Return [ROWS] numbers in 0 .. 1 - 2**-24 that no column's noise has a part in."""
    word, _, _, _ = tl.philox(
        seeds,
        sequence_index.to(tl.uint32),
        positions.to(tl.uint32),
        (positions >> 32).to(tl.uint32),
        (tl.zeros_like(positions) + 0xFFFFFFFF).to(tl.uint32),
    )
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _probability(rows, live, token, largest, mass, heat):
    """Return [ROWS] the probability of one token in each row."""
    logit = tl.load(rows + token, mask=live, other=float("-inf"))
    return tl.exp(tl.div_rn(logit - largest, heat)) / mass


@triton.jit
def _draw(
    rows, guess_rows, live, judged, draft, vocab_size, largest, mass, guess_largest, guess_mass, heat,
    seeds, sequence_index, positions, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return [ROWS] a token from what is left of p without q where there is a judged draft, else from p."""
    num_rows: tl.constexpr = rows.shape[0]
    best = tl.full([num_rows, COLUMNS], float("-inf"), tl.float32)
    index = tl.zeros([num_rows, COLUMNS], tl.int32)
    for first in range(0, vocab_size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        logits = load_logits(rows, live, first, vocab_size, COLUMNS)
        heats = heat[:, None] + tl.zeros_like(logits)
        scores = tl.div_rn(logits - largest[:, None], heats)
        if guess_rows is None:
            left = tl.where(judged[:, None] & (columns == draft[:, None]), scores - _LAST_RESORT, scores)
        else:
            guesses = load_logits(guess_rows, judged, first, vocab_size, COLUMNS)
            p = tl.exp(scores) / mass[:, None]
            q = tl.exp(tl.div_rn(guesses - guess_largest[:, None], heats)) / guess_mass[:, None]
            residual = tl.where(p > q, tl.log(tl.where(p > q, p - q, 1.0)), scores - _LAST_RESORT)
            left = tl.where(judged[:, None], residual, scores)
        sums = left + gumbel_tile(seeds, sequence_index, positions, first, COLUMNS)
        better = sums > best
        best = tl.where(better, sums, best)
        index = tl.where(better, columns, index)
    return first_largest(best, index)[1]


@triton.jit
def _judge(
    target_ptr, guess_ptr, drafts_ptr, starts_ptr, temperature_ptr, seeds_ptr, sequence_index_ptr, positions_ptr,
    token_ids_ptr, num_accepted_ptr, num_seqs, vocab_size, num_places, target_stride, guess_stride, drafts_stride,
    starts_stride, temperature_stride, seeds_stride, sequence_stride, positions_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sequences = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = sequences < num_seqs
    start = tl.load(starts_ptr + sequences * starts_stride, mask=inside, other=0).to(tl.int64)
    num_rows = tl.load(starts_ptr + (sequences + 1) * starts_stride, mask=inside, other=0).to(tl.int64) - start
    num_rows = tl.minimum(num_rows, num_places)
    temperature = tl.load(temperature_ptr + sequences * temperature_stride, mask=inside, other=0.0)
    heat = tl.where(temperature > 0.0, temperature, 1.0)
    seeds = tl.load(seeds_ptr + sequences * seeds_stride, mask=inside, other=0)
    sequence_index = tl.load(sequence_index_ptr + sequences * sequence_stride, mask=inside, other=0)
    positions = tl.load(positions_ptr + sequences * positions_stride, mask=inside, other=0)
    num_accepted = tl.zeros([ROWS], tl.int32)
    running = inside & (num_rows > 0)
    for place in range(num_places):
        token = tl.full([ROWS], -1, tl.int64)
        if tl.max(running.to(tl.int32), 0) > 0:
            row = start + place
            rows = target_ptr + row * target_stride
            judged = running & (place < num_rows - 1)
            draft = tl.load(drafts_ptr + row * drafts_stride, mask=judged, other=0)
            largest, greedy, mass = largest_and_mass(rows, running, vocab_size, heat, COLUMNS)
            p = _probability(rows, judged, draft, largest, mass, heat)
            guess_rows = None
            guess_largest = largest
            guess_mass = mass
            q = tl.full([ROWS], 1.0, tl.float32)
            if guess_ptr is not None:
                guess_rows = guess_ptr + row * guess_stride
                guess_largest, _, guess_mass = largest_and_mass(guess_rows, judged, vocab_size, heat, COLUMNS)
                q = _probability(guess_rows, judged, draft, guess_largest, guess_mass, heat)
            drawing = temperature > 0.0
            likely = _uniform(seeds, sequence_index, positions + place) * q < p
            accepted = judged & tl.where(drawing, likely, draft == greedy)
            token = tl.where(accepted, draft, greedy.to(tl.int64))
            undrawn = running & drawing & ~accepted
            if tl.max(undrawn.to(tl.int32), 0) > 0:
                drawn = _draw(
                    rows, guess_rows, running, judged, draft, vocab_size, largest, mass, guess_largest, guess_mass,
                    heat, seeds, sequence_index, positions + place, COLUMNS,
                )  # fmt: skip
                token = tl.where(undrawn, drawn.to(tl.int64), token)
            token = tl.where(running, token, -1)
            num_accepted += accepted.to(tl.int32)
            running = accepted
        tl.store(token_ids_ptr + sequences * num_places + place, token, mask=inside)
    tl.store(num_accepted_ptr + sequences, num_accepted, mask=inside)
