"""Puts result lines of several engines side by side: medians, ratios to the first engine, JSON and a plot.

    cat octavo.jsonl others.jsonl | python benchmarks/compare.py --out benchmarks/results/offline_throughput

Lines come from `offline_throughput.py` or from another engine's runner that prints the same keys. Lines with equal
engine and settings are repetitions of one measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

FIGURES = ("output_tokens_per_s", "total_tokens_per_s", "single_stream_tokens_per_s", "load_seconds", "peak_rss_mb")


def label(line: dict[str, Any]) -> str:
    """Name a measurement by its engine and the settings that tell it from others."""
    settings = ", ".join(str(v) for v in line["settings"].values() if isinstance(v, str))
    return f"{line['engine']} ({settings})" if settings else str(line["engine"])


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per engine and settings, in order of first appearance, with the median of each figure."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["engine"], line["settings"]], sort_keys=True), []).append(line)
    rows = []
    for group in groups.values():
        row = {"label": label(group[0]), "engine": group[0]["engine"], "settings": group[0]["settings"]}
        row |= {figure: statistics.median(line[figure] for line in group) for figure in FIGURES}
        row["runs"] = [line["output_tokens_per_s"] for line in group]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table; ratios are the first row's figure over this row's."""
    first = rows[0]
    ratio_title = f"{first['engine']} / this"
    lines = [
        f"| engine | output tok/s | {ratio_title} | single stream tok/s | {ratio_title} | load s | peak RSS MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = first["output_tokens_per_s"] / row["output_tokens_per_s"]
        single = first["single_stream_tokens_per_s"] / row["single_stream_tokens_per_s"]
        lines.append(
            f"| {row['label']} | {row['output_tokens_per_s']:.1f} | {ratio:.2f}"
            f" | {row['single_stream_tokens_per_s']:.1f} | {single:.2f}"
            f" | {row['load_seconds']:.1f} | {row['peak_rss_mb']:.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw throughput and single-stream speed of every engine."""
    import matplotlib.pyplot as plt

    labels = [row["label"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.45 * len(rows) + 1.4), sharey=True, layout="constrained")
    for axes, name, title in (
        (left, "output_tokens_per_s", "all requests at once, output tok/s"),
        (right, "single_stream_tokens_per_s", "single stream, tok/s"),
    ):
        colours = ["tab:blue" if row["engine"] == rows[0]["engine"] else "tab:gray" for row in rows]
        bars = axes.barh(labels, [row[name] for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set_title(title)
        axes.margins(x=0.15)
    left.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="*", help="files of JSON lines; standard input if none")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    text = "\n".join(path.read_text() for path in arguments.lines) if arguments.lines else sys.stdin.read()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    rows = summarise(lines)
    print(table(rows))
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps({"summary": rows, "lines": lines}, indent=1) + "\n")
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
