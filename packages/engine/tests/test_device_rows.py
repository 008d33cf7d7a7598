"""Rows on the device: the inputs that it makes are those of the host's InputBuilder, and little is sent for them."""

from __future__ import annotations

import random
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

from torch import Tensor

from octavo_engine.batch import CachedRow, ScheduledBatch
from octavo_engine.models.llama import Llama
from octavo_engine.runner.device_rows import DeviceRows
from octavo_engine.runner.forward import OpByOp
from octavo_engine.runner.graph_plan import GraphPlan
from octavo_engine.runner.late_device import LateDevice
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.testing import random_model, tiny_config
from octavo_engine.types import SamplingParams
from octavo_kvcache import TableUpdate

_SHARED = runpy.run_path(str(Path(__file__).with_name("test_graphs.py")))
SeenModel, setup, setup_of, requests_of, request, run, enter, decode, BLOCK_SIZE, VOCAB_SIZE = (
    _SHARED[name]
    for name in (
        "SeenModel", "setup", "setup_of", "requests_of", "request", "run", "enter", "decode", "BLOCK_SIZE",
        "VOCAB_SIZE",
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config(vocab_size=VOCAB_SIZE))


class KeepingModel(SeenModel):  # type: ignore[misc, valid-type]
    """A model that keeps what it was given, cut to the sequences and tokens that there are."""

    def __call__(self, model_input: ModelInput) -> Tensor:
        hidden: Tensor = super().__call__(model_input)
        self.seen[-1] = plain(model_input)
        return hidden


def plain(step: ModelInput) -> dict[str, Any]:
    """Return a step's numbers, without those that fill it up and those of block tables that nobody reads."""
    num_seqs, num_tokens = int((step.seq_lens > 0).sum()), int(step.query_start_loc[-1])
    lens = step.seq_lens[:num_seqs].tolist()
    return {
        "token_ids": step.token_ids[:num_tokens].tolist(),
        "positions": step.positions[:num_tokens].tolist(),
        "query_start_loc": step.query_start_loc[: num_seqs + 1].tolist(),
        "seq_lens": lens,
        "slots": [slots[:num_tokens].tolist() for _, slots in step.groups],
        "tables": [
            [row[: -(-length // BLOCK_SIZE)] for row, length in zip(table.tolist(), lens, strict=False)]
            for table, _ in step.groups
        ],
    }


PLAN = GraphPlan((1, 2, 4, 6), mixed_sizes=(8, 16), max_num_seqs=6)


@pytest.mark.parametrize(
    ("free", "plan"),
    [pytest.param(True, PLAN, id="free rows, graphs"), pytest.param(False, None, id="ruled rows too, op by op")],
)
def test_each_step_has_the_input_that_the_host_would_make(model: Llama, free: bool, plan: GraphPlan | None) -> None:
    """Over chunks, forks, hits, preemptions, aborts, rows that change hands, and steps with the host in between."""
    num_preemptions = num_waited = 0
    for seed in range(2):
        requests, aborts = requests_of(seed, free=free)
        ahead, batches = KeepingModel(model), list[ScheduledBatch]()
        made = setup(ahead, LateDevice(num_late=1, seed=seed), plan, num_blocks=20, depth=3)
        launch = made.runner.launch
        made.runner.launch = lambda batch, launch=launch, batches=batches: (batches.append(batch), launch(batch))[1]
        replayed = KeepingModel(model)
        runner = setup_of(replayed, None, num_blocks=20).runner
        for one, kept in ((made.runner, ahead), (runner, replayed)):
            one.forward = OpByOp(kept, model.greedy)
            kept.seen.clear()
        run(made.engine, requests, aborts, random.Random(seed))
        for batch in batches:
            runner.execute(batch)
        num_preemptions += made.engine.scheduler.counters.num_preemptions
        num_waited += sum(made.engine.overlap_stats.num_waited.values())
        assert len(replayed.seen) == sum(batch.num_tokens > 0 for batch in batches)
        assert without_repeats(ahead.seen) == replayed.seen
    assert num_preemptions > 1
    assert (num_waited > 10) is not free


def test_a_plan_that_did_not_arrive_is_sent_again(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel")

    made, expected = setup(model, LateDevice(num_late=1)), setup_of(model, None)
    with monkeypatch.context() as patched:
        patched.setattr(DeviceRows, "update", fail)
        with pytest.raises(RuntimeError, match="no kernel"):
            made.runner.execute(ScheduledBatch(step_id=0, new=(enter(2, (1, 2), (5,)),)))
    for step in (
        ScheduledBatch(step_id=1, new=(enter(2, (7, 8, 9), (6,)),), finished=(2,)),
        decode(2, (2, 3)),
    ):
        assert made.runner.execute(step) == expected.runner.execute(step)
    assert all(cache[6].isfinite().all() for cache in made.runner.storage.layer(0))  # its own block


def without_repeats(steps: list[Any]) -> list[Any]:
    """Return steps without those that were computed again at once: a capture does that."""
    return [step for step, before in zip(steps, [None, *steps], strict=False) if step != before]


@dataclass(slots=True)
class CountingDevice(LateDevice):
    """A LateDevice that counts the bytes of each upload."""

    uploads: list[int] = field(default_factory=list)

    def upload(self, source: Tensor, destination: Tensor) -> None:
        self.uploads.append(source.nbytes)
        LateDevice.upload(self, source, destination)


def test_a_decode_step_is_sent_what_has_changed(model: Llama) -> None:
    device = CountingDevice(num_late=1)
    made, expected = setup(model, device), setup_of(model, None)
    sampled = SamplingParams(temperature=1.0, top_p=0.9)
    enters = tuple(enter(row, (1, 2, row), (5 + row,), sampled) for row in range(4))
    grown = CachedRow(1, 4, 1, True, (TableUpdate(1, (20,)),))
    steps = [
        (ScheduledBatch(step_id=0, new=enters), None),
        (decode(1, (0, 3), (1, 3), (2, 3), (3, 3)), []),  # rows, tokens and parameters are there
        (ScheduledBatch(step_id=2, cached=(grown,), finished=(0, 2, 3)), [16 * 4]),  # a row; a run, its bounds, a block
        (decode(3, (1, 5)), []),
        (ScheduledBatch(step_id=4, new=(enter(0, (3,), (9,), sampled),), cached=decode(4, (1, 6)).cached), None),
        (decode(5, (1, 7), (0, 1)), [16]),  # in another order
        (decode(6, (0, 2)), [16]),
    ]
    for step, uploads in steps:
        device.uploads.clear()
        assert made.runner.execute(step) == expected.runner.execute(step)
        assert uploads is None or device.uploads == uploads
