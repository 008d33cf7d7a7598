"""Where a decode step goes: the share outside native kernels, at batch 1 and 32, in `exact` and `fast`.

    python benchmarks/step_profile.py --out benchmarks/results/step_profile

A step is everything between two tokens: scheduling, input building, the forward pass, sampling, taking in the answer
and turning tokens into text. Time inside native kernels is counted by the kernels themselves; the rest of the step is
split into the scheduler's two halves, the text side, and the runner around its kernels. Only steps in which every
sequence decodes count; the figure is the median over steps. The 99th percentile of them is shown beside it: a step that
comes to new pages of the KV cache waits until the system has cleared them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workload import english_ids, make_fixed_workload

from octavo_engine import EngineConfig, SamplingParams
from octavo_engine.assembly import BuiltEngine
from octavo_engine.build import build_engine
from octavo_kernels import fallbacks

TARGETS = {("fast", 32): 10.0, ("fast", 1): 15.0, ("exact", 1): 15.0}  # percent outside kernels, at most


@dataclass(frozen=True)
class Profile:
    """The median step of one mode and batch; milliseconds, and percent of the step."""

    mode: str
    batch: int
    num_steps: int
    step_ms: float
    p99_ms: float
    kernels_ms: float
    schedule_ms: float
    update_ms: float
    text_ms: float
    runner_ms: float
    outside_percent: float
    target_percent: float | None

    def __str__(self) -> str:
        verdict = ""
        if self.target_percent is not None:
            word = "met" if self.outside_percent <= self.target_percent else "NOT met"
            verdict = f" (target {self.target_percent:g} %, {word})"
        return (
            f"{self.mode}, batch {self.batch}: step {self.step_ms:.2f} ms (99 %: {self.p99_ms:.2f}), outside kernels"
            f" {self.outside_percent:.1f} %{verdict}: runner {self.runner_ms:.3f}, schedule {self.schedule_ms:.3f},"
            f" update {self.update_ms:.3f}, text {self.text_ms:.3f} ms"
        )


def kernel_seconds() -> float:
    """Return the seconds that this process has spent inside native kernels so far.

    Raises:
        SystemExit: if the installed kernels do not count them.
    """
    try:
        from octavo_kernels.cpu.probe import kernel_seconds as count
    except ImportError as error:
        raise SystemExit(f"these kernels do not count the time inside them ({error}); build the native ones") from error
    return count()


class Stopwatch:
    """Adds up the seconds spent inside calls of a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return timed

    def take(self) -> float:
        """Return the seconds so far and start again at 0."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def submit(built: BuiltEngine, batch: int, num_steps: int) -> dict[str, Any]:
    """Queue the requests; return the text stream of each by its id."""
    streams = {}
    requests = make_fixed_workload(batch, 7, english_ids(), prompt_length=64, output_length=num_steps)
    for place, workload_request in enumerate(requests):
        sampling = SamplingParams(temperature=0, max_tokens=workload_request["out"], ignore_eos=True)
        request = built.text.make_request(workload_request["prompt_ids"], sampling, request_id=str(place))
        streams[request.request_id] = built.text.stream(request)
        built.engine.add(request)
    return streams


def profile(mode: str, batch: int, num_steps: int, model: str | None) -> Profile:
    """Run a batch to its end and take the median of the steps in which all of it decodes."""
    built = build_engine(EngineConfig(model=model, mode=mode, max_num_seqs=max(batch, 2)))
    streams = submit(built, batch, num_steps)
    scheduler = built.engine.scheduler
    schedule, update = Stopwatch(), Stopwatch()
    scheduler.schedule = schedule.around(scheduler.schedule)  # type: ignore[method-assign]
    scheduler.update = update.around(scheduler.update)  # type: ignore[method-assign]
    steps: list[tuple[float, float, float, float, float]] = []
    while built.engine.has_work:
        schedule.take()
        update.take()
        kernels_before, started = kernel_seconds(), time.perf_counter()
        updates = built.engine.step()
        stepped = time.perf_counter()
        for one in updates:
            streams[one.request_id].push(one)
        ended = time.perf_counter()
        if len(updates) == batch and not any(one.finish_reason for one in updates):
            kernels = kernel_seconds() - kernels_before
            steps.append((ended - started, kernels, schedule.take(), update.take(), ended - stepped))
    built.engine.close()
    if len(steps) < 2:
        raise SystemExit(f"batch {batch}: too few steps in which every sequence decoded; raise --steps")
    step, kernels, scheduling, updating, text = (
        1000 * statistics.median(column) for column in zip(*steps[1:], strict=True)
    )
    return Profile(
        mode=mode,
        batch=batch,
        num_steps=len(steps) - 1,
        step_ms=step,
        p99_ms=1000 * statistics.quantiles((one[0] for one in steps[1:]), n=100, method="inclusive")[-1],
        kernels_ms=kernels,
        schedule_ms=scheduling,
        update_ms=updating,
        text_ms=text,
        runner_ms=step - kernels - scheduling - updating - text,
        outside_percent=100 * (1 - kernels / step),
        target_percent=TARGETS.get((mode, batch)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    arguments = parser.parse_args()
    profiles = []
    for batch in arguments.batches:
        for mode in arguments.modes:
            one = profile(mode, batch, arguments.steps, arguments.model)
            profiles.append(one)
            print(one, flush=True)
    if fallbacks():
        print(f"not native, and counted as outside kernels: {', '.join(fallbacks())}")
    if arguments.out:
        document = {"profiles": [asdict(p) for p in profiles], "fallbacks": sorted(fallbacks())}
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
