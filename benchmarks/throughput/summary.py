"""Medians, ratios against targets, a table and a plot out of the throughput benchmark's lines."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from throughput.cases import CASES

Line = dict[str, Any]
ONLINE_FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")


@dataclass(frozen=True)
class Target:
    """A ratio of medians to be reached: ours over the best setting of a peer; None is a ratio without a target."""

    case: str
    ours: str
    peer: str
    at_least: float | None
    setting: str = ""  # how the peer's setting begins; "" is its best


TARGETS = (
    Target("offline", "exact", "vllm", 2.5),
    Target("offline", "exact", "hf", 8.0, "static"),
    Target("offline", "fast", "llamacpp", 3.0),
    Target("n3", "exact", "vllm", 3.0),
    Target("n3", "exact", "hf", None),
    Target("single", "exact", "llamacpp", 1.3, "Q4_1"),
    Target("single", "exact", "vllm", 5.0),
    Target("single", "fast", "llamacpp", 1.3),
    *(Target(case, "exact", peer, None) for case in ("prefix", "long") for peer in ("vllm", "hf")),
    Target("prefix", "fast", "llamacpp", None),
)


@dataclass(frozen=True)
class Row:
    """The median of one contender in one case; `spread` is (highest - lowest) / median of the throughput."""

    case: str
    num_requests: int
    engine: str
    setting: str
    num_runs: int
    output_tokens_per_s: float
    spread: float
    load_seconds: float
    peak_rss_mb: float
    figures: dict[str, float]

    @property
    def label(self) -> str:
        return f"Octavo {self.engine}" if self.engine in ("exact", "fast") else f"{self.engine} {self.setting}"


@dataclass(frozen=True)
class Ratio:
    """A target and what was measured for it."""

    target: Target
    num_requests: int
    setting: str
    measured: float

    @property
    def met(self) -> bool | None:
        return None if self.target.at_least is None else self.measured >= self.target.at_least

    def __str__(self) -> str:
        verdict = {True: "met", False: "NOT met", None: ""}[self.met]
        wanted = f" (target {self.target.at_least:g}, {verdict})" if self.target.at_least else ""
        head = f"{self.target.case} ({self.num_requests} requests)"
        return f"{head}: {self.target.ours} / {self.target.peer} {self.setting}: {self.measured:.2f}{wanted}"


def summarise(lines: list[Line]) -> list[Row]:
    """Return a row per case, number of requests, engine and setting, in the order of cases and first appearance."""
    groups: dict[tuple[str, int, str, str], list[Line]] = {}
    for line in lines:
        key = (line["case"], line["num_requests"], line["engine"], line["setting"])
        groups.setdefault(key, []).append(line)
    rows = [_row(key, group) for key, group in groups.items()]
    order = list(CASES)
    return sorted(rows, key=lambda row: (order.index(row.case), row.num_requests))


def _row(key: tuple[str, int, str, str], group: list[Line]) -> Row:
    rates = [line["output_tokens_per_s"] for line in group]
    median = statistics.median(rates)
    names = ("single_stream_tokens_per_s", "requests_per_s", *ONLINE_FIGURES)
    figures = {n: statistics.median(line[n] for line in group) for n in names if n in group[0]}
    return Row(
        *key,
        num_runs=len(group),
        output_tokens_per_s=median,
        spread=(max(rates) - min(rates)) / median,
        load_seconds=statistics.median(line["load_seconds"] for line in group),
        peak_rss_mb=statistics.median(line["peak_rss_mb"] for line in group),
        figures=figures,
    )


def ratios(rows: list[Row]) -> list[Ratio]:
    """Return every ratio of `TARGETS` for which both sides were measured."""
    found = []
    sizes = dict.fromkeys((row.case, row.num_requests) for row in rows)
    for case, num_requests in sizes:
        own = [row for row in rows if (row.case, row.num_requests) == (case, num_requests)]
        for target in TARGETS:
            ours = [r for r in own if r.engine == target.ours]
            peers = [r for r in own if r.engine == target.peer and r.setting.startswith(target.setting)]
            if target.case == case and ours and peers:
                best = max(peers, key=lambda r: r.output_tokens_per_s)
                measured = ours[0].output_tokens_per_s / best.output_tokens_per_s
                found.append(Ratio(target, num_requests, best.setting, measured))
    return found


def unmeasured(found: list[Ratio]) -> list[Target]:
    """Return the targets for which a side is missing."""
    have = {ratio.target for ratio in found}
    return [target for target in TARGETS if target.at_least is not None and target not in have]


def table(rows: list[Row], failures: list[Line], refusals: list[tuple[str, str, str]]) -> str:
    """Format all cases as Markdown tables; who has no part in a case, or failed, stands there with the reason."""
    parts = []
    for case, num_requests in dict.fromkeys((row.case, row.num_requests) for row in rows):
        own = [row for row in rows if (row.case, row.num_requests) == (case, num_requests)]
        parts.append(f"{case}: {CASES[case].title}, {num_requests} requests")
        parts.append(_online_table(own) if case == "online" else _case_table(own))
        reasons = dict.fromkeys(why for name, _, why in refusals if name == case)
        for reason in reasons:
            without = [who for name, who, why in refusals if (name, why) == (case, reason)]
            parts.append(f"no part in it: {'; '.join(without)} ({reason})")
        parts.append("")
    parts += [f"{f['case']}: {f['engine']} {f['setting']} failed in round {f['round']}: {f['error']}" for f in failures]
    return "\n".join(parts)


def _case_table(rows: list[Row]) -> str:
    lines = [
        "| engine | output tok/s | spread | 128-token stream, tok/s | load s | peak RSS MB | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: -r.output_tokens_per_s):
        single = row.figures.get("single_stream_tokens_per_s", 0)
        lines.append(
            f"| {row.label} | {row.output_tokens_per_s:.1f} | {row.spread:.0%} | {single:.1f}"
            f" | {row.load_seconds:.1f} | {row.peak_rss_mb:.0f} | {row.num_runs} |"
        )
    return "\n".join(lines)


def _online_table(rows: list[Row]) -> str:
    lines = [
        "| engine | load | requests/s | output tok/s | TTFT p50, p99 ms | inter-token p50, p99 ms"
        " | load s | peak RSS MB | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, first_99, between, between_99 = (row.figures[name] for name in ONLINE_FIGURES)
        lines.append(
            f"| {row.label} | {row.setting} | {row.figures['requests_per_s']:.2f} | {row.output_tokens_per_s:.1f}"
            f" | {first:.0f}, {first_99:.0f} | {between:.1f}, {between_99:.1f}"
            f" | {row.load_seconds:.1f} | {row.peak_rss_mb:.0f} | {row.num_runs} |"
        )
    return "\n".join(lines)


def document(rows: list[Row], found: list[Ratio], failures: list[Line], lines: list[Line]) -> dict[str, Any]:
    """Return everything as one JSON object."""
    return {
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(r) | {"met": r.met} for r in found],
        "targets_not_measured": [asdict(target) for target in unmeasured(found)],
        "failures": failures,
        "lines": lines,
    }


def plot(rows: list[Row], path: Path) -> None:
    """Draw the throughput of every contender, a panel per case."""
    import matplotlib.pyplot as plt

    offline = [row for row in rows if row.case != "online"]
    panels = list(dict.fromkeys((row.case, row.num_requests) for row in offline))
    if not panels:
        return
    counts = [sum((row.case, row.num_requests) == panel for row in offline) for panel in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.3 * sum(counts) + 0.9 * len(panels)), layout="constrained", squeeze=False,
        height_ratios=[count + 1 for count in counts],
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        own = sorted((r for r in offline if (r.case, r.num_requests) == panel), key=lambda r: r.output_tokens_per_s)
        colours = ["tab:blue" if row.engine in ("exact", "fast") else "tab:gray" for row in own]
        bars = axis.barh([row.label for row in own], [row.output_tokens_per_s for row in own], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.set_title(f"{CASES[panel[0]].title}; output tok/s", fontsize=10)
        axis.margins(x=0.12)
    figure.savefig(path, dpi=120)
    plt.close(figure)
