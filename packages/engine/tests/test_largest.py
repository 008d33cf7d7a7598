"""The largest of rows: those of a stable sort, however many are asked for."""

import pytest

torch = pytest.importorskip("torch", reason="the runner needs the extra octavo-engine[local]")

from octavo_engine.runner.largest import largest

COUNTS = (1, 2, 5, 20, 63, 64, 200, 499, 500, 900)


def rows_of(kind: str) -> "torch.Tensor":
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(6, 500, generator=generator)
    if kind == "many equals":
        values = values.mul(2).round()
    elif kind == "all equal":
        values = torch.zeros(6, 500)
    elif kind == "few left":
        values = values.round().masked_fill(torch.rand(6, 500, generator=generator) < 0.98, float("-inf"))
    return values


@pytest.mark.parametrize("kind", ["different", "many equals", "all equal", "few left"])
@pytest.mark.parametrize("count", COUNTS)
def test_the_largest_are_the_first_of_a_stable_sort(kind: str, count: int):
    values = rows_of(kind)
    columns, best = largest(values, count)
    expected = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(columns, expected.indices[:, :count])
    assert torch.equal(best, expected.values[:, :count])


@pytest.mark.parametrize("count", [1, 3, 100])
def test_nan_comes_first_and_harms_no_other_row(count: int):
    values = rows_of("different")
    expected = largest(values, count)[1]
    values[2, 77] = float("nan")
    best = largest(values, count)[1]
    others = [0, 1, 3, 4, 5]
    assert best[2, 0].isnan()
    assert torch.equal(best[others], expected[others])
