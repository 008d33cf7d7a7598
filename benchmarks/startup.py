"""Start-up: seconds from starting `octavo run` to its first text, with a cold and with a warm page cache.

    python benchmarks/startup.py --out benchmarks/results/startup

What is run is an installation of this checkout, from wheels that are built first. Each round runs both. Before a cold
run the page cache is dropped and the user's cache folder is an empty one (XDG_CACHE_HOME), as on the first run after an
installation and a restart; where the page cache may not be dropped, the benchmark says so, and "cold" then means the
empty folder alone. A warm run has the files in memory and keeps the cache folder of the cold run before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from installed import Installation, install

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
TARGETS = {"cold": 5.0, "warm": 3.0}  # seconds to the first text, at most


@dataclass(frozen=True)
class Start:
    """One run; seconds from the start of the process."""

    first_text: float
    end: float


def drop_page_cache() -> str | None:
    """Empty the system's page cache; return why it could not be done, or None."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError as error:
        return f"{DROP_CACHES}: {error.strerror}"
    return None


def start(installation: Installation, options: list[str], cache: Path) -> Start:
    """Run `octavo run` once and note when its first text comes."""
    command = [installation.program("octavo"), "run", "Say hello.", "--temperature", "0", "--max-tokens", "8", *options]
    environment = installation.environment | {"XDG_CACHE_HOME": str(cache)}
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_text = time.monotonic() - started
        process.stdout.read()
        code = process.wait()
    if code or not first.strip():
        raise SystemExit(f"octavo run ended with exit code {code} and {'no' if not first else 'blank'} first text")
    return Start(first_text, time.monotonic() - started)


def measure(
    installation: Installation, options: list[str], num_rounds: int
) -> tuple[dict[str, list[Start]], str | None]:
    """Return the runs of each kind, and why the page cache could not be dropped, or None."""
    runs: dict[str, list[Start]] = {"cold": [], "warm": []}
    obstacle = None
    for _ in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            obstacle = drop_page_cache()
            runs["cold"].append(start(installation, options, Path(folder)))
            runs["warm"].append(start(installation, options, Path(folder)))
    return runs, obstacle


def verdict(kind: str, seconds: float) -> str:
    """Return a median beside its target."""
    word = "met" if seconds <= TARGETS[kind] else "NOT met"
    return f"{kind}: {seconds:.2f} s to the first text (target {TARGETS[kind]:g} s, {word})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--mode", default=None, help="exact or fast; the program's default if left out")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    arguments = parser.parse_args()
    options = ["--model", arguments.model] if arguments.model else []
    options += ["--mode", arguments.mode] if arguments.mode else []
    with tempfile.TemporaryDirectory() as folder:
        runs, obstacle = measure(install(Path(folder)), options, arguments.rounds)
    if obstacle:
        print(f"the page cache was not dropped ({obstacle}): cold is an empty cache folder alone")
    medians = {kind: statistics.median(run.first_text for run in starts) for kind, starts in runs.items()}
    for kind, seconds in medians.items():
        times = ", ".join(f"{run.first_text:.2f}" for run in runs[kind])
        print(f"{verdict(kind, seconds)}; runs: {times}")
    if arguments.out:
        document = {
            "page_cache_dropped": obstacle is None,
            "median_seconds": medians,
            "target_seconds": TARGETS,
            "runs": {kind: [asdict(run) for run in starts] for kind, starts in runs.items()},
        }
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
