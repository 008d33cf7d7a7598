"""Pooling over chunks: how a prompt is cut does not show in its mean, not even in its last bit."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runner needs the extra octavo-engine[local]")

from octavo_engine.runner.pooling import Pooler
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_rows import StepRows


def mean_of(hidden: "torch.Tensor", chunks: list[int]) -> "torch.Tensor":
    rows = Rows(1, max_num_tokens=len(hidden), max_num_blocks=1, num_groups=1)
    rows.embeds[0] = rows.pools_mean[0] = True
    pooler, start = Pooler(), 0
    pooled = {}
    for chunk in chunks:
        step = StepRows(
            rows=np.array([0]),
            num_computed_tokens=np.array([start]),
            num_scheduled_tokens=np.array([chunk]),
            token_starts=np.array([0]),
            samples=np.array([start + chunk == len(hidden)]),
            sources=np.array([0]),
        )
        pooled = pooler.pool(step, rows, hidden[start : start + chunk])
        start += chunk
    return pooled[0]


@pytest.mark.parametrize("chunks", [[1, 3], [2, 2], [3, 1], [1, 1, 1, 1], [1, 2, 1]], ids=str)
def test_sums_whose_order_matters_come_out_alike(chunks: list[int]):
    hidden = torch.tensor([[1e16, 1.0], [1.0, 2.0], [1.0, 3.0], [-1e16, 4.0]])
    assert torch.equal(mean_of(hidden, chunks), mean_of(hidden, [4]))
