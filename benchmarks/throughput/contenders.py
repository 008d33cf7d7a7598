"""The contenders of the throughput benchmark: which command measures which case, and what one cannot do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from throughput.cases import Case

BENCHMARKS = Path(__file__).resolve().parents[1]
LLAMACPP_BATCH = 2048  # tokens of the runner's batch: a longer prompt is never admitted


@dataclass(frozen=True)
class Peers:
    """Where the other engines are: a folder of runner scripts, and a folder with a virtual environment for each."""

    runners: Path
    home: Path

    def command(self, environment: str, script: str) -> list[str]:
        return [str(self.home / environment / "bin" / "python"), str(self.runners / script)]


class Contender(Protocol):
    """An engine with its settings."""

    @property
    def engine(self) -> str: ...

    @property
    def setting(self) -> str: ...

    def refusal(self, case: Case) -> str | None:
        """Say why this contender has no part in a case; None if it has."""
        ...

    def command(self, case: Case, workload: Path) -> list[str]:
        """Return the command that measures a case and prints one JSON line last."""
        ...


@dataclass(frozen=True)
class Octavo:
    """This engine in one of its modes; the engine is named by the mode."""

    engine: str
    setting: str = "octavo"

    def refusal(self, case: Case) -> str | None:
        return "measured by its own means" if case.name == "online" else None

    def command(self, case: Case, workload: Path) -> list[str]:
        script = str(BENCHMARKS / "offline_throughput.py")
        return [sys.executable, script, str(workload), "--mode", self.engine, "--n", str(case.n)]


@dataclass(frozen=True)
class VLLM:
    """vLLM's CPU build; its prefix cache is on where prefixes or samples share a prompt."""

    peers: Peers
    setting: str  # the dtype
    engine: str = "vllm"

    def refusal(self, case: Case) -> str | None:
        return "only Octavo is measured online" if case.name == "online" else None

    def command(self, case: Case, workload: Path) -> list[str]:
        command = [*self.peers.command("vllm", "run_vllm.py"), str(workload), "--dtype", self.setting]
        command += ["--n", str(case.n), "--context", str(max(2048, case.context))]
        return [*command, "--prefix-cache"] if case.shares_prefix else command


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp with parallel slots, on the file as shipped (Q4_1) or on another type made from it."""

    peers: Peers
    weights: str
    num_slots: int
    engine: str = "llamacpp"

    @property
    def setting(self) -> str:
        return f"{self.weights}, up to {self.num_slots} slots"

    def refusal(self, case: Case) -> str | None:
        if case.name == "online":
            return "only Octavo is measured online"
        if case.n > 1:
            return "the runner has no samples that share a prompt"
        if case.context > LLAMACPP_BATCH:
            return f"the runner admits prompts up to {LLAMACPP_BATCH} tokens"
        return None

    def command(self, case: Case, workload: Path) -> list[str]:
        num_slots = min(self.num_slots, case.num_requests)
        command = [*self.peers.command("llamacpp", "run_llamacpp.py"), str(workload), "--slots", str(num_slots)]
        command += ["--context", str(case.context + 64)]
        return command if self.weights == "Q4_1" else [*command, "--requantise", self.weights]


@dataclass(frozen=True)
class Transformers:
    """Transformers in float32: static padded batches, or its own continuous batching."""

    peers: Peers
    setting: str  # "static 8" or "continuous"
    engine: str = "hf"

    def refusal(self, case: Case) -> str | None:
        if case.name == "online":
            return "only Octavo is measured online"
        if self.setting == "continuous" and case.n > 1:
            return "the runner has samples in static batches only"
        return None

    def command(self, case: Case, workload: Path) -> list[str]:
        command = [*self.peers.command("hf", "run_hf.py"), str(workload), "--n", str(case.n)]
        return [*command, "--continuous"] if self.setting == "continuous" else [*command, "--batch", "8"]


def contenders(peers: Peers | None, slots: list[int]) -> list[Contender]:
    """Return all contenders in the order in which they take turns; without peers ours alone."""
    ours: list[Contender] = [Octavo("exact"), Octavo("fast")]
    if peers is None:
        return ours
    return [
        *ours,
        *(VLLM(peers, dtype) for dtype in ("float32", "bfloat16")),
        *(LlamaCpp(peers, weights, num) for weights in ("Q4_1", "Q4_0", "Q8_0", "F16") for num in slots),
        *(Transformers(peers, setting) for setting in ("static 8", "continuous")),
    ]


def select(all_contenders: list[Contender], names: list[str]) -> list[Contender]:
    """Return those named: an engine (`vllm`), or one of its settings by its beginning (`llamacpp:Q4_0`).

    Raises:
        SystemExit: if a name fits none.
    """
    chosen = []
    for name in names:
        engine, _, setting = name.partition(":")
        fitting = [c for c in all_contenders if c.engine == engine and c.setting.startswith(setting)]
        if not fitting:
            known = ", ".join(f"{c.engine}:{c.setting}" for c in all_contenders)
            raise SystemExit(f"--engines: {name!r} is none of: {known} (peers need --peers)")
        chosen += fitting
    return chosen
