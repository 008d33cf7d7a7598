"""Octavo on a CPU beside vLLM, llama.cpp and Transformers: the same requests, in turn, each run in its own process.

    python benchmarks/cpu_throughput.py --peers RUNNERS --peers-home FOLDER --rounds 3
    python benchmarks/cpu_throughput.py --cases offline,n3 --engines exact,vllm:float32 --peers RUNNERS
    python benchmarks/cpu_throughput.py --summary

RUNNERS holds `run_vllm.py`, `run_llamacpp.py` and `run_hf.py`, each of which takes a workload file and prints a line
like `offline_throughput.py`; FOLDER holds a virtual environment for each (`vllm`, `llamacpp`, `hf`), by default
$PEERS_HOME. Engines alternate: a round measures each once. Every finished run is a line in OUT.jsonl at once, and a run
that has its line is not repeated: after an interruption the same command goes on, and to measure anew give another
--out. At the end, or with --summary, the lines become a table of medians, ratios against the project's targets (those
that are not met are named), OUT.json and OUT.png. The case `online` offers requests to a server of ours as a Poisson
process at shares of the capacity that the case `offline` measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from throughput.cases import CASES, Case
from throughput.contenders import BENCHMARKS, Contender, Peers, contenders, select
from throughput.process import MeasurementFailed, measure
from throughput.summary import Line, document, plot, ratios, summarise, table, unmeasured
from workload import WorkloadRequest, describe, english_ids

LOADS = (0.5, 0.8)


@dataclass(frozen=True)
class Job:
    """One run; the first five fields tell it from every other on the same requests."""

    case: str
    num_requests: int
    engine: str
    setting: str
    round: int
    workload: str  # a digest of the requests
    command: tuple[str, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.case, self.num_requests, self.engine, self.setting, self.round)

    @property
    def head(self) -> Line:
        names = ("case", "num_requests", "engine", "setting", "round")
        return dict(zip(names, self.key, strict=True)) | {"workload": self.workload}


class Lines:
    """The lines measured so far, kept in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        self.all: list[Line] = [json.loads(line) for line in text.splitlines() if line.strip()]

    @property
    def finished(self) -> list[Line]:
        return [line for line in self.all if "error" not in line]

    @property
    def failures(self) -> list[Line]:
        """The failed runs that no later run has made good."""
        done = {_key(line) for line in self.finished}
        return [line for line in self.all if "error" in line and _key(line) not in done]

    def add(self, line: Line) -> None:
        self.all.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, job: Job) -> bool:
        """Return whether a job has its line; what was measured on other requests must not be mixed with it."""
        for line in self.finished:
            same_case = (line["case"], line["num_requests"]) == (job.case, job.num_requests)
            if same_case and line["workload"] != job.workload:
                sys.exit(f"{self._path} has runs of {job.case} on other requests; give another --out")
        return any(_key(line) == job.key for line in self.finished)


def _key(line: Line) -> tuple[Any, ...]:
    return (line["case"], line["num_requests"], line["engine"], line["setting"], line["round"])


def write_workloads(arguments: argparse.Namespace, cases: list[Case], folder: Path) -> dict[str, tuple[Path, int]]:
    """Write the workload of each case; return its file and number of requests."""
    files = {}
    token_ids = english_ids(arguments.model)
    for case in cases:
        given = arguments.workload and case.name in ("offline", "n3", "online")
        if given:
            requests: list[WorkloadRequest] = json.loads(arguments.workload.read_text())
        else:
            wanted = None if case.one_size else arguments.requests
            requests = case.make(wanted or case.num_requests, arguments.seed, token_ids)
        if arguments.max_output:
            requests = [
                WorkloadRequest(prompt_ids=r["prompt_ids"], out=min(r["out"], arguments.max_output)) for r in requests
            ]
        path = folder / f"{case.name}.json"
        path.write_text(json.dumps(requests))
        files[case.name] = (path, len(requests))
        print(f"{case.name}: {describe(requests)}")
    return files


def digest(path: Path) -> str:
    """Return a short digest of a workload file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def jobs(
    cases: list[Case], chosen: list[Contender], files: dict[str, tuple[Path, int]], arguments: argparse.Namespace
) -> Iterator[Job]:
    """Yield all runs: each round goes through the cases, each case through the engines in turn."""
    for number in range(arguments.rounds):
        for case in cases:
            path, num_requests = files[case.name]
            for contender in chosen:
                if contender.refusal(case) is None:
                    command = contender.command(case, path)
                    if arguments.model and contender.engine in ("exact", "fast"):
                        command += ["--model", arguments.model]
                    yield Job(
                        case.name,
                        num_requests,
                        contender.engine,
                        contender.setting,
                        number,
                        digest(path),
                        tuple(command),
                    )


def online_jobs(
    lines: Lines, chosen: list[Contender], file: tuple[Path, int], arguments: argparse.Namespace
) -> Iterator[Job]:
    """Yield the runs over HTTP, at shares of the offline capacity measured for the same number of requests."""
    path, num_requests = file
    rows = {r.engine: r for r in summarise(lines.finished) if (r.case, r.num_requests) == ("offline", num_requests)}
    requests: list[WorkloadRequest] = json.loads(path.read_text())
    mean_output = sum(r["out"] for r in requests) / len(requests)
    ours = [contender for contender in chosen if contender.engine in ("exact", "fast")]
    for contender in ours:
        if contender.engine not in rows:
            print(f"online: left out {contender.engine}, whose offline capacity is not known; measure the case offline")
    for number in range(arguments.rounds):
        for load in LOADS:
            for contender in (c for c in ours if c.engine in rows):
                rate = load * rows[contender.engine].output_tokens_per_s / mean_output
                command = [sys.executable, str(BENCHMARKS / "online_latency.py"), str(path), "--mode", contender.engine]
                command += ["--rate", f"{rate:.4f}", "--seed", str(arguments.seed + number)]
                if arguments.model:
                    command += ["--model", arguments.model]
                yield Job("online", num_requests, contender.engine, f"{load:.0%}", number, digest(path), tuple(command))


def run(job: Job, lines: Lines, arguments: argparse.Namespace) -> None:
    """Measure one job, unless its line is there, and keep the line."""
    name = f"round {job.round + 1}, {job.case}, {job.engine} {job.setting}"
    if lines.has(job):
        print(f"{name}: measured already", flush=True)
        return
    started = time.monotonic()
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PEERS_HOME": str(arguments.peers_home)}
    try:
        result = measure(list(job.command), environment=environment, timeout=arguments.timeout)
    except MeasurementFailed as error:
        lines.add(job.head | {"error": str(error)})
        print(f"{name}: FAILED, {error}", flush=True)
        return
    result.pop("engine", None)
    lines.add(job.head | result)
    rate, took = result["output_tokens_per_s"], time.monotonic() - started
    print(f"{name}: {rate:.1f} output tok/s, {result['peak_rss_mb']} MB; took {took:.0f} s", flush=True)


def summarise_lines(lines: Lines, all_contenders: list[Contender], out: Path) -> None:
    """Print tables and ratios, write OUT.json and OUT.png."""
    if not lines.finished:
        sys.exit(f"no finished run in {out}.jsonl")
    rows = summarise(lines.finished)
    found = ratios(rows)
    refusals = [
        (case.name, f"{c.engine} {c.setting}", reason)
        for case in CASES.values()
        for c in all_contenders
        if case.name != "online" and (reason := c.refusal(case))
    ]
    print("\n" + table(rows, lines.failures, refusals))
    for ratio in found:
        print(ratio)
    for target in unmeasured(found):
        print(f"{target.case}: {target.ours} / {target.peer} {target.setting or 'best'}: not measured")
    versions = {name: metadata.version(name) for name in ("torch", "octavo-engine", "octavo-kernels")}
    setting = {"python": platform.python_version(), "num_cpus": len(os.sched_getaffinity(0)), "versions": versions}
    out.with_suffix(".json").write_text(
        json.dumps(setting | document(rows, found, lines.failures, lines.finished), indent=1) + "\n"
    )
    plot(rows, out.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="offline,n3,prefix,single,long,online")
    parser.add_argument("--engines", default=None, help="exact,fast,vllm,llamacpp,hf, or one setting: llamacpp:Q4_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=None, help="of offline, n3, prefix, online; default 48")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workload", type=Path, help="a workload file for offline, n3 and online")
    parser.add_argument("--max-output", type=int, default=None, help="cut outputs to this many tokens, for a trial")
    parser.add_argument("--model", default=None, help="ours only: file, folder or hub id; the demo model if left out")
    parser.add_argument("--peers", type=Path, help="folder with the peers' runner scripts; ours alone if left out")
    parser.add_argument(
        "--peers-home",
        type=Path,
        default=Path(os.environ.get("PEERS_HOME", "~/.cache/octavo-peers")).expanduser(),
        help="folder with the peers' virtual environments; default $PEERS_HOME",
    )
    parser.add_argument("--slots", default="16", help="parallel slots of llama.cpp; several: 16,32")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run may take")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "cpu_throughput")
    parser.add_argument("--summary", action="store_true", help="measure nothing; summarise OUT.jsonl")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    lines = Lines(out.with_suffix(".jsonl"))
    peers = Peers(arguments.peers.resolve(), arguments.peers_home.resolve()) if arguments.peers else None
    all_contenders = contenders(peers, [int(number) for number in arguments.slots.split(",")])
    if arguments.summary:
        summarise_lines(lines, all_contenders, out)
        return
    default = "exact,fast,vllm,llamacpp,hf" if peers else "exact,fast"
    chosen = select(all_contenders, (arguments.engines or default).split(","))
    unknown = [name for name in arguments.cases.split(",") if name not in CASES]
    if unknown:
        sys.exit(f"--cases: {unknown[0]!r} is none of: {', '.join(CASES)}")
    cases = [CASES[name] for name in arguments.cases.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        files = write_workloads(arguments, cases, Path(folder))
        for job in jobs([c for c in cases if c.name != "online"], chosen, files, arguments):
            run(job, lines, arguments)
        if "online" in files:
            for job in online_jobs(lines, chosen, files["online"], arguments):
                run(job, lines, arguments)
    summarise_lines(lines, all_contenders, out)


if __name__ == "__main__":
    main()
