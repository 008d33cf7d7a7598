"""Bench: times calls on a GPU with cold caches, and keeps what was measured in a JSON file as it goes."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]

_COLD_BYTES = 160 << 20  # more than twice the 60 MB of an H200's L2
_ROUNDS = 5
_AT_LEAST = 0.02  # seconds of work in one round


class OutOfTime(Exception):
    """The part has used its minutes; what it measured is kept."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes per second of a copy, read and written, and bf16 operations per second."""

    copy: float
    gemm: float


@dataclass
class Bench:
    """One part's measurements.

    Attributes:
        part: its name.
        device: where it runs.
        smoke: tiny sizes, to see that everything runs; its timings mean nothing.
        path: the JSON file.
        deadline: of `time.monotonic`, after which no new measurement begins.
        rows: what was measured.
        sound: False once something of ours could not run, or was wrong.
    """

    part: str
    device: torch.device
    smoke: bool
    path: Path
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    sound: bool = True

    def size(self, full: int, smoke: int) -> int:
        """Return a size for the machine, or for a run that only shows that everything works."""
        return smoke if self.smoke else full

    def add(self, name: str, **figures: Any) -> None:
        """Keep and print one row; where the value has a target or a limit, `met` says whether it holds."""
        row = {"name": name, **figures}
        if "target" in row or "at_most" in row:
            inside = row["value"] >= row.get("target", row["value"]) and row["value"] <= row.get(
                "at_most", row["value"]
            )
            row["met"] = None if self.smoke and self.part != "correctness" else bool(inside)
            self.sound = self.sound and (row["met"] is not False or self.part != "correctness")
        self.rows.append(row)
        self._write()
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        mark = {True: "  (met)", False: "  (NOT MET)"}.get(row.get("met", ""), "")
        print(f"{name:<58} {shown}{mark}", flush=True)

    def check_time(self) -> None:
        """Raise OutOfTime once the part has used its minutes."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    @contextmanager
    def attempt(self, name: str, *, ours: bool = True) -> Iterator[None]:
        """Measure something; where it cannot run, the reason is its row, and what is ours makes the part fail."""
        self.check_time()
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:  # what is measured next has nothing to do with it
            self.add(name, not_measured=f"{type(error).__name__}: {error}"[:400])
            self.sound = self.sound and not ours
        self.free()

    def free(self) -> None:
        """Give back memory that nothing refers to any more."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def num_copies(self, num_bytes: int) -> int:
        """Return how many copies of inputs of so many bytes are needed for a cold L2 when they take turns."""
        return 1 if self.smoke else max(1, -(-_COLD_BYTES // max(num_bytes, 1)))

    def seconds(self, calls: Sequence[Call]) -> float:
        """Return the seconds of one call: the calls in turn in a CUDA graph, the median of several rounds."""
        self.check_time()
        for call in calls:
            call()
        if self.device.type != "cuda":
            started = time.perf_counter()
            calls[0]()
            return time.perf_counter() - started
        graph = _capture(calls)
        once = _time_replays(graph, 1)
        replays = max(1, int(_AT_LEAST / max(once, 1e-6)))
        rounds = [_time_replays(graph, replays) for _ in range(_ROUNDS)]
        return statistics.median(rounds) / len(calls)

    def ceilings(self) -> Ceilings:
        """Measure the ceilings, on this machine and in this run."""
        count = self.size(1 << 28, 1 << 10)
        source = torch.empty(count, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / self.seconds([partial(target.copy_, source)])
        side = self.size(8192, 32)
        a = torch.randn(side, side, dtype=torch.bfloat16, device=self.device)
        b = torch.randn(side, side, dtype=torch.bfloat16, device=self.device)
        product = torch.empty_like(a)
        gemm = 2 * side**3 / self.seconds([partial(torch.mm, a, b, out=product)])
        return Ceilings(copy, gemm)

    def _write(self) -> None:
        environment = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        kind = "smoke run: the timings mean nothing" if self.smoke else "measured"
        document = {"part": self.part, "kind": kind, "environment": environment, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n")


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _time_replays(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / replays


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
