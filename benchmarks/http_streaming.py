"""What HTTP adds to an engine: to the first token, to the pace of 200 streams, and to the mean step at batch 32.

    python benchmarks/http_streaming.py first --out benchmarks/results/http_streaming
    python benchmarks/http_streaming.py pace --out benchmarks/results/http_streaming
    python benchmarks/http_streaming.py steps --out benchmarks/results/http_streaming

`first`: streams of the demo model one at a time; the time from sending a request to its first event, beside the
engine's own time to the first token as `/metrics` has it. `pace`: 200 streams of a fake engine with 20 tokens a second
each, a minute long; the longest gap between events of a stream. `steps`: the demo model decodes 32 sequences, in turn
for nobody and for 32 streams; the time between steps that bring 32 tokens. The load comes from `streaming/reader.py`,
bare sockets in another process, which in `steps` looks ten times a second, so that what it costs itself stays small;
its CPU time is printed. A run keeps its part in OUT.json, and draws OUT.png when all parts are there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from streaming.served import StepClock, paced_engine, read_streams, real_engine, served

from octavo_engine import AsyncEngine, SamplingParams

TARGETS = {"first": 10.0, "pace": 100.0, "steps": 5.0}  # ms, ms, percent
PROMPT = "The history of printing begins with"
NUM_STREAMS, TOKENS_PER_S = 200, 20
BATCH = 32
READER_REST = 0.1  # seconds between its looks in `steps`


def cpu_seconds() -> float:
    """Return the CPU time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def engine_first_token(port: int) -> float:
    """Return the engine's own seconds to first tokens, summed over all requests so far."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    names = ("octavo_request_queue_time_seconds_sum ", "octavo_request_prefill_time_seconds_sum ")
    return sum(float(line.split()[1]) for line in lines if line.startswith(names))


def measure_first(num_requests: int) -> dict[str, Any]:
    """Stream answers one at a time; compare the first event with the engine's first token."""
    engine = real_engine()
    over_http, own = [], []
    try:
        with served(engine) as port:
            for place in range(num_requests + 3):  # the first three warm up
                before = engine_first_token(port)
                body = {"prompt": f"{place} {PROMPT}", "max_tokens": 8, "stream": True, "temperature": 0}
                seen = read_streams(port, body | {"ignore_eos": True}, num_streams=1, stagger=0.0)
                over_http += seen["first"]
                own.append(engine_first_token(port) - before)
    finally:
        engine.close()
    added = [1000 * (a - b) for a, b in zip(over_http, own, strict=True)][3:]
    return {
        "num_requests": num_requests,
        "ms_over_http": 1000 * statistics.median(over_http[3:]),
        "ms_engine": 1000 * statistics.median(own[3:]),
        "ms_added": statistics.median(added),
        "ms_added_p99": percentile(added, 0.99),
        "ms_added_max": max(added),
    }


def measure_pace(seconds: float) -> dict[str, Any]:
    """Stream from a fake engine to 200 readers at once; find the longest gap."""
    model = real_engine(num_blocks=200)
    engine = paced_engine(model.text, model.info, tokens_per_s=TOKENS_PER_S, num_streams=NUM_STREAMS)
    model.close()
    try:
        with served(engine) as port:
            body = {"prompt": "x", "max_tokens": int(seconds * TOKENS_PER_S), "stream": True, "temperature": 0}
            started, cpu = time.monotonic(), cpu_seconds()
            seen = read_streams(port, body, num_streams=NUM_STREAMS, stagger=0.02)
            elapsed, cpu = time.monotonic() - started, cpu_seconds() - cpu
    finally:
        engine.close()
    gaps = [1000 * gap for stream in seen["gaps"] for gap in stream]
    num_events = sum(seen["num_events"])
    return {
        "num_streams": NUM_STREAMS,
        "tokens_per_s_each": TOKENS_PER_S,
        "seconds": elapsed,
        "num_events": num_events,
        "gap_ms_p50": statistics.median(gaps),
        "gap_ms_p99": percentile(gaps, 0.99),
        "gap_ms_max": max(gaps),
        "server_cpu_share": cpu / elapsed,
        "server_us_per_event": 1e6 * cpu / num_events,
        "reader_cpu_share": seen["cpu_seconds"] / elapsed,
    }


def decode_for_nobody(engine: AsyncEngine, num_tokens: int) -> None:
    """Let the engine's thread run the batch; its updates have no reader."""
    text, inner = engine.text, engine._engine
    for place in range(BATCH):
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        request = text.make_request(text.encode_prompt(PROMPT), sampling, request_id=f"alone-{time.time()}-{place}")
        engine._commands.do(lambda request=request: inner.add(request))
    while engine.stats().num_running + engine.stats().num_waiting == 0:
        time.sleep(0.001)
    while engine.stats().num_running + engine.stats().num_waiting:
        time.sleep(0.05)


def measure_steps(num_rounds: int, num_tokens: int, mode: str) -> dict[str, Any]:
    """Decode in turn for nobody and for 32 streams; compare the time between steps."""
    engine = real_engine(mode=mode)
    clock = StepClock(engine._engine)
    alone: list[list[float]] = []
    over_http: list[list[float]] = []
    reader, num_events = 0.0, 0
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "stream": True, "temperature": 0, "ignore_eos": True}
    try:
        with served(engine) as port:
            decode_for_nobody(engine, 16)
            clock.intervals(BATCH)
            for _ in range(num_rounds):
                decode_for_nobody(engine, num_tokens)
                alone.append(clock.intervals(BATCH))
                seen = read_streams(port, body, num_streams=BATCH, stagger=0.0, rest=READER_REST)
                over_http.append(clock.intervals(BATCH))
                reader += seen["cpu_seconds"]
                num_events += sum(seen["num_events"])
    finally:
        engine.close()
    ratios = [_percent_more(statistics.mean(a), statistics.mean(b)) for a, b in zip(alone, over_http, strict=True)]
    all_alone, all_over_http = list(chain(*alone)), list(chain(*over_http))
    return {
        "mode": mode,
        "batch": BATCH,
        "rounds": num_rounds,
        "tokens": num_tokens,
        "ms_per_step_alone": 1000 * statistics.mean(all_alone),
        "ms_per_step_over_http": 1000 * statistics.mean(all_over_http),
        "percent_added": _percent_more(statistics.mean(all_alone), statistics.mean(all_over_http)),
        "percent_added_to_median_step": _percent_more(statistics.median(all_alone), statistics.median(all_over_http)),
        "percent_added_by_round": ratios,
        "reader_cpu_seconds": reader,
        "reader_us_per_event": 1e6 * reader / num_events,
    }


def _percent_more(alone: float, over_http: float) -> float:
    return 100 * (over_http / alone - 1)


def verdict(part: str, result: dict[str, Any]) -> str:
    """Return what was measured beside its target."""
    value, unit = {
        "first": (result.get("ms_added_max", 0.0), "ms added to the first token at most"),
        "pace": (result.get("gap_ms_max", 0.0), "ms in the longest gap"),
        "steps": (result.get("percent_added", 0.0), "percent added to the mean step"),
    }[part]
    return f"{part}: {value:.2f} {unit} (target {TARGETS[part]:g}, {'met' if value < TARGETS[part] else 'NOT met'})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw each part beside its target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        ("first token", "ms added", results["first"]["ms_added"], results["first"]["ms_added_max"], TARGETS["first"]),
        ("gap, 200 streams", "ms", results["pace"]["gap_ms_p50"], results["pace"]["gap_ms_max"], TARGETS["pace"]),
        ("step, batch 32", "% added", results["steps"]["percent_added"],
         max(results["steps"]["percent_added_by_round"]), TARGETS["steps"]),
    ]  # fmt: skip
    figure, axes = pyplot.subplots(1, len(bars), figsize=(9, 3.2))
    for axis, (title, unit, typical, worst, target) in zip(axes, bars, strict=True):
        axis.bar(["typical", "worst"], [typical, worst], color=["#546e7a", "#b0bec5"])
        axis.axhline(target, color="#c62828", linestyle="--", label="target")
        axis.set_title(title)
        axis.set_ylabel(unit)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(TARGETS))
    parser.add_argument("--requests", type=int, default=40, help="of `first`")
    parser.add_argument("--seconds", type=float, default=60.0, help="of `pace`")
    parser.add_argument("--rounds", type=int, default=40, help="of `steps`")
    parser.add_argument("--tokens", type=int, default=24, help="of each sequence in `steps`")
    parser.add_argument("--mode", default="exact", help="of `steps`: exact or fast")
    parser.add_argument("--out", type=Path, help="keep the part in OUT.json; with all of them draw OUT.png")
    arguments = parser.parse_args()
    if arguments.part == "first":
        result = measure_first(arguments.requests)
    elif arguments.part == "pace":
        result = measure_pace(arguments.seconds)
    else:
        result = measure_steps(arguments.rounds, arguments.tokens, arguments.mode)
    print(json.dumps(result, indent=1))
    print(verdict(arguments.part, result), f"on {os.cpu_count()} cores")
    if arguments.out:
        kept = arguments.out.with_suffix(".json")
        results = json.loads(kept.read_text()) if kept.exists() else {}
        results[arguments.part] = result
        kept.write_text(json.dumps(results, indent=1) + "\n")
        if set(results) == set(TARGETS):
            draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
