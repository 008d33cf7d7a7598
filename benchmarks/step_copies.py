"""What a step of the overlapped runner sends to the device, and the host's time for it; the device does nothing.

    python benchmarks/step_copies.py

A device that only counts takes the uploads and forgets the work, and every draw is token 0: what is measured is the
host's side of a step, without the kernels' launches, and no GPU's speed. Rows have prompts of chance lengths and then
decode, so that each needs a block every `BLOCK_SIZE` steps. Of the kinds of steps,

    decode      has the rows of the step before, which decode
    turnover    has a row in 16 that left for one whose prompt enters, 200 tokens of it
    sampled     is `decode` by temperature and top_p
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch
from octavo_engine.runner.overlapped_runner import OverlappedRunner
from octavo_engine.testing import random_model, tiny_config
from octavo_engine.types import SamplingParams
from octavo_kvcache import TableUpdate
from octavo_kvcache.storage import KVStorage

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
PROMPT_LENS = (500, 4000)
NEW_PROMPT_LEN = 200
KINDS = ("decode", "sampled", "turnover")


@dataclass(frozen=True)
class Copies:
    """The outcome for one kind of steps."""

    kind: str
    num_seqs: int
    mean_bytes: float
    median_bytes: int
    share_without_upload: float
    median_host_us: float
    least_host_us: float


class _Event:
    is_done = True

    def wait(self) -> None:
        """Return at once."""


@dataclass
class CountingDevice:
    """A device that counts bytes and does nothing."""

    uploads: list[int] = field(default_factory=list)

    def host_bytes(self, num_bytes: int) -> Tensor:
        """Allocate host memory: zeros, which a draw never replaces."""
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def upload(self, source: Tensor, destination: Tensor) -> None:  # noqa: ARG002
        """Count."""
        self.uploads.append(source.nbytes)

    def launch(self, work: Callable[[], None]) -> None:
        """Forget the work."""

    def download(self, source: Tensor, destination: Tensor) -> None:
        """Leave the zeros."""

    def record(self) -> _Event:
        """Return a point that is over."""
        return _Event()


class Rows:
    """Batches of rows that decode, some of which leave and enter."""

    def __init__(self, num_seqs: int, sampling: SamplingParams) -> None:
        self._random, self._sampling, self._step_id = random.Random(0), sampling, 0
        self._lens = [self._random.randint(*PROMPT_LENS) for _ in range(num_seqs)]

    def enter(self) -> ScheduledBatch:
        """Let all enter."""
        self._step_id += 1
        new = tuple(self._new(row) for row in range(len(self._lens)))
        return ScheduledBatch(step_id=self._step_id, new=new)

    def go_on(self, num_changing: int) -> ScheduledBatch:
        """Let some leave and others enter in their rows, and the rest decode."""
        self._step_id += 1
        changing = set(self._random.sample(range(len(self._lens)), num_changing))
        cached = tuple(self._cached(row) for row in range(len(self._lens)) if row not in changing)
        for row in changing:
            self._lens[row] = NEW_PROMPT_LEN
        new = tuple(self._new(row) for row in sorted(changing))
        return ScheduledBatch(step_id=self._step_id, new=new, cached=cached, finished=tuple(sorted(changing)))

    def _new(self, row: int) -> NewRow:
        num_tokens = self._lens[row]
        return NewRow(
            row=row,
            token_ids=(1,) * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=self._sampling,
            seed=row,
            sequence_index=0,
            stop_token_ids=frozenset(),
            block_ids=(tuple(range(1, -(-num_tokens // BLOCK_SIZE) + 1)),),
            num_computed_tokens=0,
            num_scheduled_tokens=num_tokens,
            samples=True,
        )

    def _cached(self, row: int) -> CachedRow:
        position = self._lens[row]
        self._lens[row] += 1
        index, offset = divmod(position, BLOCK_SIZE)
        return CachedRow(row, position, 1, True, () if offset else (TableUpdate(index, (7,)),))


def measure(kind: str, num_seqs: int, num_steps: int) -> Copies:
    """Run steps of one kind."""
    model = random_model(replace(tiny_config(), max_position_embeddings=MAX_MODEL_LEN))
    device = CountingDevice()
    runner = OverlappedRunner(
        model,
        KVStorage(model.kv_cache_specs(torch.float32), 8, BLOCK_SIZE),
        gpu=device,  # type: ignore[arg-type]
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * PROMPT_LENS[1],
        max_model_len=MAX_MODEL_LEN,
    )
    rows = Rows(
        num_seqs, SamplingParams(temperature=1.0, top_p=0.9) if kind == "sampled" else SamplingParams(temperature=0)
    )
    runner.launch(rows.enter()).result()
    num_changing = max(1, num_seqs // 16) if kind == "turnover" else 0
    num_bytes, seconds = [], []
    pending = runner.launch(rows.go_on(0))
    for _ in range(num_steps):
        device.uploads.clear()
        batch = rows.go_on(num_changing)
        start = time.perf_counter()
        following = runner.launch(batch)
        seconds.append(time.perf_counter() - start)
        num_bytes.append(sum(device.uploads))
        pending.result()
        pending = following
    return Copies(
        kind=kind,
        num_seqs=num_seqs,
        mean_bytes=sum(num_bytes) / num_steps,
        median_bytes=sorted(num_bytes)[num_steps // 2],
        share_without_upload=num_bytes.count(0) / num_steps,
        median_host_us=sorted(seconds)[num_steps // 2] * 1e6,
        least_host_us=min(seconds) * 1e6,
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="where to write, without the .json")
    options = parser.parse_args()
    results = [measure(kind, num_seqs, options.steps) for kind in KINDS for num_seqs in options.num_seqs]
    for one in results:
        copies = (
            f"{one.mean_bytes:8.0f} bytes a step (median {one.median_bytes}), {one.share_without_upload:4.0%} without"
        )
        host = f"{one.median_host_us:6.0f} us of the host (least {one.least_host_us:.0f})"
        print(f"{one.kind:9} {one.num_seqs:4} rows: {copies}, {host}")
    if options.out is not None:
        text = json.dumps([asdict(one) for one in results], indent=1)
        options.out.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
