"""largest: the greatest numbers of each row and where they stand, by a rule that leaves no choice among equals."""

from __future__ import annotations

from torch import Tensor


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of rows, of equals those furthest left first.

    `Tensor.topk` alone takes any of equals, in an order that hangs on how many are asked for: where that is what the
    hungriest row of a batch wants, the others would see it.

    Args:
        values: [rows, columns]; not modified.
        count: at least 1; at most as many as there are columns are returned.

    Returns:
        columns: [rows, count] int64, those of the largest values first.
        values: [rows, count], falling.
    """
    if count >= values.shape[1]:
        whole = values.sort(dim=-1, descending=True, stable=True)
        return whole.indices, whole.values
    found = values.topk(count + 1, dim=-1)  # one more shows whether the last place was contested
    columns, last = found.indices[:, :count], found.values[:, count - 1]
    for row in (last == found.values[:, count]).nonzero()[:, 0].tolist():
        num_above = int((found.values[row] > last[row]).sum())
        equals = (values[row] == last[row]).nonzero()[:, 0]
        columns[row, num_above:] = equals[: count - num_above]
    columns = columns.sort(dim=-1).values
    in_order = values.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return columns.gather(1, in_order.indices), in_order.values
