"""Adapters with magnitudes (DoRA), against Transformers with each merged into the base by hand, in float64."""

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

from octavo_engine import LLM, SamplingParams
from octavo_engine.adapters.weights import AdapterWeights, LowRank
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.magnitudes import magnitude_factors
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import Shard
from octavo_engine.runner.adapter_pool import AdapterPool

VOCAB_SIZE = 131
NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TIE = 1e-3
MLP = ("gate_proj", "up_proj", "down_proj")

Checkpoint = tuple[Path, Any]
Write = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="too slow in the interpreter")


def write_dora(write_adapter: Write, folder: Path, model: Any, seed: int, names: tuple[str, ...]) -> Any:
    """Write an adapter with magnitudes; return a copy of the model with it merged in."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {
        name: linear.weight.norm(dim=1) * (torch.rand(len(linear.weight), generator=generator) + 0.5)
        for name, linear in model.named_modules()
        if name.endswith(names)
    }
    extra = {f"base_model.model.{name}.lora_magnitude_vector": length for name, length in lengths.items()}
    matrices = write_adapter(folder, model, seed=seed, names=names, use_dora=True, extra=extra)
    model = copy.deepcopy(model)
    for name, (a, b) in matrices.items():
        weight = model.get_submodule(name).weight
        changed = weight.data.double() + 2.0 * b.double() @ a.double()
        weight.data = (lengths[name].double()[:, None] * changed / changed.norm(dim=1, keepdim=True)).float()
    return model


def check(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Check that each token of a greedy answer is the model's likeliest, or ties with it."""
    assert len(answer) == NUM_TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert (logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]).max() <= TIE


@pytest.mark.parametrize("names", [MLP, ("q_proj", "v_proj", "o_proj", "up_proj")], ids=["recorded", "with biases"])
def test_magnitudes_beside_other_adapters_equal_each_merged_into_the_base(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Callable[..., Any], tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder, model = tiny_llama
    models = {
        None: model,
        "plain": merged(model, write_adapter(tmp_path / "plain", model, seed=1)),
        "x": write_dora(write_adapter, tmp_path / "x", model, 2, names),
        "y": write_dora(write_adapter, tmp_path / "y", model, 3, names),
    }
    source = random.Random(3)
    prompts = [[source.randrange(VOCAB_SIZE) for _ in range(source.randint(3, 20))] for _ in range(8)]
    with LLM(str(folder), show_progress=False, num_blocks=400, enable_lora=True, max_loras=2) as llm:
        for name in ("plain", "x", "y"):
            llm.load_adapter(name, str(tmp_path / name))
        for order in (["plain", None, "x", "x"] * 2, ["x", "y", None, "plain"] * 2):  # slots change hands
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, adapter=order)
            for name, prompt, output in zip(order, prompts, outputs, strict=True):
                check(models[name], prompt, output.outputs[0].token_ids)


def test_factors_are_made_once_for_an_adapter_that_comes_back(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tiny_llama
    for seed, name in enumerate("xy"):
        write_dora(write_adapter, tmp_path / name, model, seed, MLP)
    made = []
    of_version = AdapterPool._factors_of

    def watched(pool: AdapterPool, version: bytes, weights: AdapterWeights) -> Any:
        made.append(id(of_version(pool, version, weights)))
        return of_version(pool, version, weights)

    monkeypatch.setattr(AdapterPool, "_factors_of", watched)
    with LLM(str(folder), show_progress=False, num_blocks=400, enable_lora=True, max_loras=1) as llm:
        for name in "xy":
            llm.load_adapter(name, str(tmp_path / name))
        for name in "xyx":
            llm.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY, adapter=name)
    assert made[2] == made[0] != made[1]


def test_factors_are_magnitudes_over_the_norms_of_rows_whatever_the_size_and_bias() -> None:
    shards = [Shard("q", 6), Shard("k", 4), Shard("v", 3)]
    linear = Linear(200, shards, bias=True, options=LayerOptions())
    generator = torch.Generator().manual_seed(0)
    tensors = {slot.name: torch.randn(slot.shape, generator=generator) for slot in linear.slots("m.")}
    tensors["m.k.weight"][2] = 0
    for slot in linear.slots("m."):
        slot.fill(tensors[slot.name])
    linear.finish()
    a, b = torch.randn(2, 200, generator=generator), torch.randn(4, 2, generator=generator)
    b[2] = 0
    magnitude = torch.rand(4, generator=generator)
    weights = AdapterWeights(b"", {"m.k": LowRank(a, b, 0.7, magnitude), "m.q": LowRank(a, torch.ones(6, 2), 1.0)})
    factors = magnitude_factors(linear, weights, "m.")
    expected = magnitude.double() / (tensors["m.k.weight"].double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    expected[2] = 1  # a row of zeros
    assert list(factors) == ["k"]
    torch.testing.assert_close(factors["k"].double(), expected, rtol=2e-6, atol=0)
    assert magnitude_factors(linear, AdapterWeights(b"", {}), "m.") == {}
