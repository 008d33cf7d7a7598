"""Answers do not depend on company, bit for bit, however a CPU multiplies; and what `deterministic` comes to."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.determinism import resolve_deterministic
from octavo_engine.engine import Engine
from octavo_engine.errors import InvalidConfig
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.llama import Llama
from octavo_engine.models.mixtral import Mixtral
from octavo_engine.quant.choose import choose_method
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import random_weights, tiny_config
from octavo_engine.types import NOTHING_CACHED, Pooling, Request, SamplingParams, SequenceUpdate, TokenSpan
from octavo_kvcache import CacheManager
from octavo_kvcache.storage import KVStorage

VOCAB_SIZE = 500
# As wide as real layers' smallest, so that a product's sums have an order to choose.
CONFIG = replace(
    tiny_config(vocab_size=VOCAB_SIZE),
    hidden_size=320,
    intermediate_size=1536,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
)
MIXTURE = replace(
    CONFIG, architecture="MixtralForCausalLM", intermediate_size=96, num_experts=3, num_experts_per_token=2
)
on_a_cpu = pytest.mark.skipif(os.environ.get("OCTAVO_BACKEND", "cpu") != "cpu", reason="only `cpu` promises it")


def model_of(weights: torch.dtype, activations: torch.dtype, *, alone: bool, config: ModelConfig = CONFIG) -> Llama:
    """Return a model of random weights; with `alone` torch multiplies, native kernels or not."""
    device = torch.device("cpu")
    quant = Unquantized() if alone else choose_method(device, activations)
    model = (Mixtral if config.num_experts else Llama)(config, LayerOptions(activations, device, quant))
    values = random_weights(config, seed=4)
    for slot in model.slots():
        slot.fill(values[slot.name].mul(0.3).to(weights))
    model.finish()
    return model


PATHS: dict[str, Callable[[], Llama]] = {
    "float32": lambda: model_of(torch.float32, torch.float32, alone=False),
    "bfloat16 weights": lambda: model_of(torch.bfloat16, torch.float32, alone=False),
    "float32 by torch": lambda: model_of(torch.float32, torch.float32, alone=True),
    "bfloat16": lambda: model_of(torch.bfloat16, torch.bfloat16, alone=True),
    "float16": lambda: model_of(torch.float16, torch.float16, alone=True),
    "mixture": lambda: model_of(torch.float32, torch.float32, alone=False, config=MIXTURE),
    "int8 KV cache": lambda: model_of(torch.float32, torch.float32, alone=False),
}
if os.environ.get("OCTAVO_CPU_ISA") != "none":  # torch alone takes its time for all these small products
    PATHS["mixture in bfloat16"] = lambda: model_of(torch.bfloat16, torch.bfloat16, alone=True, config=MIXTURE)


def engine_of(model: Llama, kv_dtype: torch.dtype, **shape: Any) -> Engine:
    """Return an engine; by default one with room, without a prefix cache."""
    options = {"num_blocks": 400, "max_num_batched_tokens": 1024, "max_num_seqs": 16, "prefix_cache": False} | shape
    runner = ModelRunner(
        model,
        KVStorage(model.kv_cache_specs(kv_dtype), options["num_blocks"], 8),
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        max_model_len=CONFIG.max_position_embeddings,
    )
    scheduler = Scheduler(
        CacheManager(options["num_blocks"], 8, prefix_cache=options["prefix_cache"]),
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        max_model_len=CONFIG.max_position_embeddings,
    )
    return Engine(scheduler, InlineExecutor(runner))


def random_request(rng: random.Random, name: str, stem: list[int]) -> Request:
    """Draw a request whose prompt may begin as others do."""
    tokens = stem[: rng.randint(1, 130)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 20))]
    inputs, priority, kind = (TokenSpan(tuple(tokens)),), rng.choice((0, 1)), rng.random()
    if kind < 0.15:
        pooling: Pooling = rng.choice(("last", "mean"))
        return Request(request_id=name, inputs=inputs, task="embed", pooling=pooling, priority=priority)
    if kind < 0.35:
        beams = BeamSearchParams(beam_width=3, max_tokens=4, logprobs=2, ignore_eos=True)
        return Request(request_id=name, inputs=inputs, sampling=beams.sampling(), beams=beams, priority=priority)
    sampling = SamplingParams(
        n=rng.choice((1, 1, 2)),
        temperature=rng.choice((0.0, 1.0)),
        top_p=rng.choice((1.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        seed=rng.getrandbits(30),
        max_tokens=rng.randint(1, 7),
        logprobs=rng.choice((0, 3, 20)),
        prompt_logprobs=rng.choice((None, 2)),
    )
    return Request(request_id=name, inputs=inputs, sampling=sampling, priority=priority)


def run(engine: Engine, requests: list[Request], rng: random.Random | None = None) -> dict[tuple[str, int], list[Any]]:
    """Run requests, which arrive one by one if there is an `rng`; return all that came, by request and sample."""
    answers: dict[tuple[str, int], list[Any]] = {}
    waiting = requests[::-1]
    while waiting or engine.has_work:
        while waiting and (rng is None or rng.random() < 0.4):
            engine.add(waiting.pop())
        for update in engine.step():
            answers.setdefault((update.request_id, update.index), []).append(_without_times(update))
    return answers


def _without_times(update: SequenceUpdate) -> SequenceUpdate:
    return update._replace(times=None, cached=NOTHING_CACHED)


@on_a_cpu
@pytest.mark.filterwarnings("ignore:.*torch serves it, not the native library:octavo_kernels.BackendFallbackWarning")
@pytest.mark.parametrize("path", PATHS)
def test_answers_do_not_depend_on_company(path: str) -> None:
    seed = int(os.environ.get("OCTAVO_SEED") or secrets.randbits(32))
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = PATHS[path]()
    kv_dtype = torch.int8 if path.startswith("int8") else model.norm.weight.dtype
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(130)]
    requests = [random_request(rng, str(number), stem) for number in range(7)]
    alone: dict[tuple[str, int], list[Any]] = {}
    roomy = engine_of(model, kv_dtype)
    for request in requests:
        alone |= run(roomy, [request])
    shape = {"num_blocks": rng.choice((48, 100)), "max_num_batched_tokens": rng.choice((7, 40)), "prefix_cache": True}
    together = run(engine_of(model, kv_dtype, **shape), requests, rng)
    for place, answer in alone.items():
        assert together[place] == answer, f"{shape}, {place} of {requests[int(place[0])]}"
    assert together.keys() == alone.keys()


@on_a_cpu
def test_a_cpu_is_deterministic_unless_told_otherwise(make_gguf: Callable[..., Path]) -> None:
    for wanted, expected in ((None, True), (True, True), (False, False)):
        config = EngineConfig(model=str(make_gguf()), num_blocks=17, max_num_seqs=2, deterministic=wanted)
        assert build_engine(config).info.deterministic is expected


def test_a_gpu_promises_nothing_and_says_why() -> None:
    cuda = torch.device("cuda")
    assert resolve_deterministic(None, cuda) is False
    assert resolve_deterministic(False, cuda) is False
    with pytest.raises(InvalidConfig, match=r"deterministic=True.*cuda.*number of rows.*leave it out"):
        resolve_deterministic(True, cuda)


def test_other_kernels_than_the_cpus_own_promise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")
    assert resolve_deterministic(None, torch.device("cpu")) is False
    with pytest.raises(InvalidConfig, match="OCTAVO_BACKEND=reference"):
        resolve_deterministic(True, torch.device("cpu"))
