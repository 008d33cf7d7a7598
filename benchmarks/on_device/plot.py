"""A bar for every figure of a part, with its target, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows that have a value, grouped by unit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_unit: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "value" in row:
            by_unit.setdefault(row.get("unit", ""), []).append(row)
    if not by_unit:
        return
    heights = [len(part) for part in by_unit.values()]
    figure, all_axes = plt.subplots(
        len(by_unit), 1, figsize=(10, 0.3 * sum(heights) + len(by_unit)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (unit, part) in zip(all_axes[:, 0], by_unit.items(), strict=True):
        bars = axes.barh([row["name"] for row in part], [row["value"] for row in part], color="tab:blue")
        axes.bar_label(bars, fmt="%.3g", padding=2)
        for place, row in enumerate(part):
            wanted = row.get("target", row.get("at_most"))
            if wanted is not None:
                axes.plot([wanted, wanted], [place - 0.4, place + 0.4], color="tab:red")
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
