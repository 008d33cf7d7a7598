"""The engine's own time per step: decode steps on a model that takes 0 ms, so that all that is left is Python.

    python benchmarks/scheduler_steps.py                 # schedule and update alone
    python benchmarks/scheduler_steps.py --runner        # and the runner: its rows, the step's tensors, the draw
    python benchmarks/scheduler_steps.py --runner --cold # the same with the processor's caches emptied before each step

All sequences decode greedily, one token a step, with prefix caching on, as a server's do. Without `--runner` an
executor answers at once; with it, the real runner drives a model whose forward pass returns a tensor made beforehand. A
model that reads its weights leaves little of Python's data in the processor's caches: `--cold` reads a buffer of 128 MB
before each step, outside the time that is taken. The least of the repeats counts: what others take is not ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from octavo_engine import Request, SamplingParams
from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.engine import Engine
from octavo_engine.executor.base import Executor
from octavo_engine.scheduler import Scheduler
from octavo_engine.types import TokenSpan
from octavo_kvcache import CacheManager

MAX_MODEL_LEN = 2048
BLOCK_SIZE = 16
PROMPT_LEN = 200
COLD_BYTES = 128 << 20
TOKEN = 7  # what the model always says


@dataclass(frozen=True)
class StepTime:
    """The outcome for one batch size; times are of the fastest repeat."""

    num_seqs: int
    ms_per_step: float
    us_per_sequence: float
    steps_per_s: float
    median_ms_per_step: float


@dataclass(frozen=True, slots=True)
class _Done:
    output: ModelOutput

    def result(self) -> ModelOutput:
        return self.output


class InstantExecutor:
    """Answers every row that ends its known tokens with the same token, without a model or memory."""

    max_in_flight = 1

    def __init__(self) -> None:
        self._answers: dict[int, _Done] = {}  # of steps in which all rows draw, by their number

    def submit(self, batch: ScheduledBatch) -> _Done:
        """Return the answer."""
        if batch.new or not all(row.samples for row in batch.cached):
            rows = (*batch.new, *batch.cached)
            return _Done(ModelOutput(token_ids=tuple((TOKEN,) if row.samples else () for row in rows)))
        num_rows = batch.num_rows
        if num_rows not in self._answers:
            self._answers[num_rows] = _Done(ModelOutput(token_ids=((TOKEN,),) * num_rows))
        return self._answers[num_rows]

    def close(self) -> None:
        """Hold nothing."""


def still_runner(max_num_seqs: int, num_blocks: int, budget: int) -> Executor:
    """Make the real runner on a model that computes nothing."""
    from dataclasses import replace

    import torch

    from octavo_engine.executor.inline import InlineExecutor
    from octavo_engine.runner.model_runner import ModelRunner
    from octavo_engine.testing import tiny_config
    from octavo_kvcache import KVCacheSpec
    from octavo_kvcache.storage import KVStorage

    class StillModel:
        """Says TOKEN to everything."""

        config = replace(tiny_config(vocab_size=16), max_position_embeddings=MAX_MODEL_LEN)

        def __init__(self) -> None:
            self._hidden = torch.zeros(budget, 1)
            self._logits = torch.zeros(max_num_seqs, 16)
            self._logits[:, TOKEN] = 1.0
            self._best, self._token_ids = self._logits.max(dim=-1)

        def __call__(self, model_input):
            return self._hidden[: model_input.token_ids.shape[0]]

        def logits(self, hidden, *, out=None):  # noqa: ARG002
            return self._logits[: hidden.shape[0]]

        def greedy(self, hidden):
            return self._token_ids[: hidden.shape[0]], self._best[: hidden.shape[0]]

        def kv_cache_specs(self, _dtype):
            return [KVCacheSpec(1, 1)]

    model = StillModel()
    storage = KVStorage(model.kv_cache_specs(torch.float32), num_blocks, BLOCK_SIZE)
    runner = ModelRunner(
        model,
        storage,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
    )
    return InlineExecutor(runner)


def running_engine(num_seqs: int, *, with_runner: bool) -> Engine:
    """Make an engine in which `num_seqs` sequences decode and nothing waits."""
    num_blocks = num_seqs * (MAX_MODEL_LEN // BLOCK_SIZE) + 1
    budget = max(2048, num_seqs)
    scheduler = Scheduler(
        CacheManager(num_blocks, BLOCK_SIZE),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
        max_num_timelines=512,
    )
    engine = Engine(scheduler, still_runner(num_seqs, num_blocks, budget) if with_runner else InstantExecutor())
    sampling = SamplingParams(temperature=0, max_tokens=MAX_MODEL_LEN - PROMPT_LEN, ignore_eos=True, seed=0)
    for place in range(num_seqs):
        prompt = tuple((place * 31 + i) % 16 for i in range(PROMPT_LEN - place % BLOCK_SIZE))
        engine.add(Request(request_id=str(place), inputs=(TokenSpan(prompt),), sampling=sampling))
    while scheduler.num_running < num_seqs or scheduler.num_waiting:
        engine.step()
    for _ in range(3):  # the last prompts end
        engine.step()
    return engine


def measure(
    num_seqs: int, *, with_runner: bool, num_steps: int, num_repeats: int, evict: Callable[[], object]
) -> StepTime:
    """Time `num_repeats` runs of `num_steps` steps; `evict` is called before each step and not timed."""
    engine = running_engine(num_seqs, with_runner=with_runner)
    seconds = []
    for _ in range(num_repeats):
        elapsed = 0.0
        for _ in range(num_steps):
            evict()
            started = time.perf_counter()
            updates = engine.step()
            elapsed += time.perf_counter() - started
        seconds.append(elapsed / num_steps)
        assert len(updates) == num_seqs
    engine.close()
    best, median = min(seconds), sorted(seconds)[len(seconds) // 2]
    return StepTime(
        num_seqs=num_seqs,
        ms_per_step=best * 1e3,
        us_per_sequence=best * 1e6 / num_seqs,
        steps_per_s=1 / best,
        median_ms_per_step=median * 1e3,
    )


def plot(rows: Sequence[StepTime], path: Path, title: str) -> None:
    """Draw the time of a step by batch size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    bars = axes.bar([str(r.num_seqs) for r in rows], [r.ms_per_step for r in rows])
    axes.bar_label(bars, labels=[f"{r.ms_per_step:.2f} ms\n{r.steps_per_s:.0f}/s" for r in rows])
    axes.margins(y=0.2)
    axes.set_xlabel("sequences decoding")
    axes.set_ylabel("time of a step, ms")
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def _nothing() -> None:
    """Leave the caches as they are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", action="store_true", help="drive the real runner on a model that computes nothing")
    parser.add_argument("--cold", action="store_true", help="empty the processor's caches before each step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=100, help="steps of a repeat")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if arguments.steps * arguments.repeats > MAX_MODEL_LEN - PROMPT_LEN - 16:
        parser.error(f"steps x repeats must be at most {MAX_MODEL_LEN - PROMPT_LEN - 16}, the room behind a prompt")
    buffer = np.ones(COLD_BYTES // 8 if arguments.cold else 0)
    rows = []
    print("sequences   ms/step   median   us/sequence   steps/s")
    for num_seqs in arguments.batches:
        row = measure(
            num_seqs,
            with_runner=arguments.runner,
            num_steps=arguments.steps,
            num_repeats=arguments.repeats,
            evict=buffer.sum if arguments.cold else _nothing,
        )
        rows.append(row)
        print(
            f"{row.num_seqs:9}   {row.ms_per_step:7.3f}  {row.median_ms_per_step:7.3f}   {row.us_per_sequence:11.2f}"
            f"   {row.steps_per_s:7.0f}"
        )
    if arguments.out:
        title = "schedule, runner and update" if arguments.runner else "schedule and update"
        title += ", caches emptied" if arguments.cold else ""
        document = {"measured": title, "block_size": BLOCK_SIZE, "rows": [asdict(r) for r in rows]}
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
        plot(rows, arguments.out.with_suffix(".png"), f"A step on a model of 0 ms: {title}")


if __name__ == "__main__":
    main()
