"""How the KV cache is sized where the device has memory of its own, measured by a fake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine import sizing
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.runner.device_memory import StepLimits, free_memory, try_largest_step
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.testing import random_model, tiny_config

GIB = 1 << 30


class FakeMeter:
    """A device with some free bytes, of which a step holds some."""

    def __init__(self, free: int, peak: int) -> None:
        self.free, self.peak, self.num_tries = free, peak, 0

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, work: Callable[[], None]) -> int:
        work()
        self.num_tries += 1
        return self.peak


def test_a_steps_memory_and_what_is_reserved_are_left_free() -> None:
    found = free_memory(FakeMeter(10 * GIB, 3 * GIB), lambda: None, num_reserved_bytes=GIB)
    assert (found.num_bytes, found.share) == (6 * GIB, 0.9)
    assert found.reason == "the 6.0 GiB of the device's memory that are free beside the weights and 3.00 GiB of a step"


def test_several_devices_have_as_much_each() -> None:
    found = free_memory(FakeMeter(10 * GIB, 3 * GIB), None, num_reserved_bytes=GIB, num_devices=2)
    assert (found.num_bytes, found.share) == (18 * GIB, 0.75)


def test_nothing_is_left_of_a_device_that_is_too_small() -> None:
    assert free_memory(FakeMeter(GIB, 2 * GIB), lambda: None, num_reserved_bytes=0).num_bytes == 0


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param(StepLimits(50, 4), id="uneven"),
        pytest.param(StepLimits(8, 8), id="decode"),
        pytest.param(StepLimits(300, 1), id="beyond the context"),
        pytest.param(StepLimits(3, 8), id="fewer tokens than sequences"),
    ],
)
def test_largest_step_is_as_large_as_a_step_can_be(limits: StepLimits) -> None:
    model, seen = random_model(tiny_config()), list[tuple[ModelInput, Tensor]]()

    class Watched:
        config = model.config

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, model_input: ModelInput) -> Tensor:
            seen.append((model_input, model(model_input)))
            return seen[-1][1]

    try_largest_step(Watched(), limits, kv_dtype=torch.float32, device=torch.device("cpu"))  # type: ignore[arg-type]
    ((model_input, hidden),) = seen
    assert len(model_input.token_ids) == limits.max_num_batched_tokens
    assert len(model_input.seq_lens) == min(limits)
    assert model_input.query_start_loc.diff().tolist() == model_input.seq_lens.tolist()
    assert model_input.max_query_len == -(-limits.max_num_batched_tokens // min(limits))
    assert hidden.isfinite().all()
    assert all(not cache.any() for layer in model_input.kv_layers for cache in (layer.k_cache[0], layer.v_cache[0]))


def test_step_that_does_not_fit_is_refused_with_the_ways_out() -> None:
    model = random_model(tiny_config())

    class Large:
        config = model.config
        kv_cache_specs = model.kv_cache_specs

        def __call__(self, model_input: ModelInput) -> Tensor:
            raise torch.cuda.OutOfMemoryError("tried to allocate 3 GiB")

    expected = r"a step of 50 tokens and 4 draws .* lower max_num_batched_tokens or max_num_seqs: tried to"
    with pytest.raises(InvalidConfig, match=expected):
        try_largest_step(Large(), StepLimits(50, 4), kv_dtype=torch.float32, device=torch.device("cpu"))  # type: ignore[arg-type]


def test_kv_cache_takes_what_a_step_leaves(make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    meter = FakeMeter(400_000, 100_000)
    monkeypatch.setattr(sizing, "meter_of", lambda device: meter)
    options: dict[str, Any] = {"model": str(make_gguf()), "max_num_seqs": 64, "max_num_batched_tokens": 64}
    info = build_engine(EngineConfig(**options)).info
    assert info.num_blocks == int(300_000 * 0.9) // (info.kv_cache_bytes // info.num_blocks)
    assert info.kv_cache_reason.startswith("90% of the 0.0 GiB of the device's memory that are free beside the weights")
    assert meter.num_tries == 1


def test_kv_cache_that_is_sized_by_hand_needs_no_try(
    make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = FakeMeter(400_000, 100_000)
    monkeypatch.setattr(sizing, "meter_of", lambda device: meter)
    info = build_engine(EngineConfig(model=str(make_gguf()), num_blocks=17, max_num_seqs=2)).info
    assert (info.num_blocks, info.kv_cache_reason.split(";")[0], meter.num_tries) == (17, "num_blocks was given", 0)
