"""Kernels that the gates must not let through: they spill, take more shared memory than there is, or do not compile."""

# ruff: noqa: N803

import triton
import triton.language as tl

KERNELS = {
    "spills": {
        "kernel": "broken:_hold_everything",
        "types": {"x_ptr": "*fp32"},
        "constants": {"SIZE": 8192},
        "num_warps": 1,
        "targets": ["sm_90"],
    },
    "takes too much shared memory": {
        "kernel": "broken:_multiply",
        "types": {"x_ptr": "*bf16"},
        "constants": {"SIZE": 128, "DEPTH": 256},
        "num_warps": 8,
        "num_stages": 5,
        "targets": ["sm_90"],
    },
    "does not compile": {
        "kernel": "broken:_misspell",
        "types": {"x_ptr": "*fp32"},
        "constants": {},
        "num_warps": 1,
    },
}


@triton.jit
def _hold_everything(x_ptr, SIZE: tl.constexpr):
    # Every value is needed after the sum of all, so each thread of a warp would have to hold 256.
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(x_ptr + offsets, x / tl.sum(x, 0))


@triton.jit
def _multiply(x_ptr, num_steps, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    rows = tl.arange(0, SIZE)
    columns = tl.arange(0, DEPTH)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(num_steps):
        x = tl.load(x_ptr + step * SIZE * DEPTH + rows[:, None] * DEPTH + columns[None, :])
        total = tl.dot(x, tl.trans(x), total)
    tl.store(x_ptr + rows[:, None] * SIZE + rows[None, :], total.to(tl.bfloat16))


@triton.jit
def _misspell(x_ptr):
    tl.store(x_ptr, y)  # noqa: F821
