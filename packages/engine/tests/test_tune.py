"""Tuning of rounded models: the forward pass and the divergence against Transformers and autograd; what is learnt."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo_engine.errors import InvalidConfig
from octavo_engine.models.config import ModelConfig
from octavo_engine.quant.calibrate.divergence import divergence
from octavo_engine.quant.calibrate.gptq import GPTQSettings, gptq
from octavo_engine.quant.calibrate.grid import Codes, round_to_nearest
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.perplexity import perplexity
from octavo_engine.quant.calibrate.plain import PlainDecoder
from octavo_engine.quant.calibrate.quantize import quantize_checkpoint
from octavo_engine.quant.calibrate.trained import Moments, TrainedCodes
from octavo_engine.quant.calibrate.tune import Tuner, TuneSettings
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource

SEQUENCES = [[(11 * i + 7 * j * j) % 131 for i in range(32)] for j in range(8)]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: weight.float() for name, weight in FolderSource(folder).weights() if isinstance(weight, Tensor)}


def rounded_to_nearest(weights: dict[str, Tensor], bits: int = 3) -> dict[str, Codes]:
    return {
        name.removesuffix(".weight"): round_to_nearest(weight, bits, 16, symmetric=False)
        for name, weight in weights.items()
        if name.endswith("_proj.weight")
    }


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
def test_the_plain_decoder_is_the_model(tiny_llama: tuple[Path, Any], window: int | None) -> None:
    folder, oracle = tiny_llama
    if window is not None:
        transformers = pytest.importorskip("transformers")
        values = {**oracle.config.to_dict(), "sliding_window": window, "architectures": ["MistralForCausalLM"]}
        windowed = transformers.MistralConfig(**{key: values[key] for key in values if key != "model_type"})
        state = oracle.state_dict()
        oracle = transformers.MistralForCausalLM(windowed).eval()
        oracle.load_state_dict(state, strict=False)  # without the biases of attention
    config = FolderSource(folder).config
    weights = {name: weight for name, weight in weights_of(folder).items() if window is None or ".bias" not in name}
    plain = PlainDecoder(with_window(config, window), weights)
    token_ids = torch.tensor(SEQUENCES[:2])
    with torch.no_grad():
        logits = plain(token_ids) @ plain.head().T
        assert torch.allclose(logits, oracle(token_ids).logits, atol=2e-4)


def with_window(config: ModelConfig, window: int | None) -> ModelConfig:
    return replace(config, sliding_window=window)


def test_divergence_and_its_gradient_are_those_of_autograd() -> None:
    random = torch.Generator().manual_seed(2)
    hidden, target = (torch.randn(3, 200, 16, generator=random, dtype=torch.float32) for _ in range(2))
    head = torch.randn(50, 16, generator=random)
    own = hidden.double().requires_grad_()
    wanted = (target.double() @ head.double().T).log_softmax(-1)
    expected = (wanted.exp() * (wanted - (own @ head.double().T).log_softmax(-1))).sum(-1).mean()
    expected.backward()
    found = divergence(hidden, target, head)
    assert found.mean == pytest.approx(expected.item(), rel=1e-5)
    assert own.grad is not None
    assert torch.allclose(found.gradient.double(), own.grad, atol=1e-7)


def test_directions_are_adams() -> None:
    random = torch.Generator().manual_seed(3)
    parameter = torch.zeros(7)
    other = torch.zeros(7, requires_grad=True)
    moments = Moments(parameter)
    adam = torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.95), eps=1e-12)
    for _ in range(5):
        gradient = torch.randn(7, generator=random)
        parameter -= 0.01 * moments.direction(gradient)
        other.grad = gradient.clone()
        adam.step()
    assert torch.allclose(parameter, other.detach(), rtol=1e-4)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
def test_codes_begin_as_they_came_and_mean_the_same(act_order: bool) -> None:
    random = torch.Generator().manual_seed(5)
    weight, x = torch.randn(24, 80, generator=random), torch.randn(200, 80, generator=random)
    codes = gptq(weight, (x.T @ x / 200).double(), GPTQSettings(4, 32, False, act_order))  # a last group of 16
    trained = TrainedCodes(codes, weight, torch.float32)
    for own, other in zip(trained.codes()[:4], codes[:4], strict=True):
        assert torch.equal(own, other)
    assert torch.allclose(trained.weight.detach(), codes.values(), atol=1e-6)


def test_a_step_moves_codes_and_scales_against_the_gradient() -> None:
    codes = Codes(
        torch.tensor([[3], [9], [8], [15]], dtype=torch.uint8),
        torch.tensor([[0.5]], dtype=torch.float16),
        torch.tensor([[8]], dtype=torch.int16),
        torch.zeros(4, dtype=torch.int64),
        4,
    )
    trained = TrainedCodes(codes, codes.values(), torch.float32)  # each weight in the middle of its code's span
    trained.weight.grad = torch.tensor([[1.0, -1.0, 0.0, -1.0]])
    trained.step(0.6, 0.01)
    found = trained.codes()
    assert found.codes.flatten().tolist() == [2, 10, 8, 15]  # there is no code above 15
    # By the scale the loss has the slope (3 - 8) - (9 - 8) - (15 - 8) < 0, so that it grows.
    assert float(found.scales) == pytest.approx(0.5 * torch.tensor(0.01).exp().item(), rel=1e-3)
    assert trained.weight.grad is None
    assert torch.allclose(trained.weight.detach(), found.values(), rtol=1e-3)


@pytest.mark.parametrize("reach", [0.0, 0.5], ids=["scales and norms", "codes too"])
def test_tuning_brings_a_model_nearer_to_what_it_was(tiny_llama: tuple[Path, Any], reach: float) -> None:
    random = torch.Generator().manual_seed(6)
    sequences = torch.randint(131, (84, 32), generator=random).tolist()
    learnt, held_out = sequences[:80], sequences[80:]
    weights = weights_of(tiny_llama[0])
    before = {name: weight.clone() for name, weight in weights.items()}
    rounded = rounded_to_nearest(weights)
    settings = TuneSettings(40, reach, 5e-3)
    tuner = Tuner(FolderSource(tiny_llama[0]).config, weights, rounded, learnt, settings)
    known, unknown = tuner.divergence(learnt[:4]), tuner.divergence(held_out)
    for _ in range(40):
        tuner.step()
    assert tuner.divergence(learnt[:4]) < 0.8 * known
    assert tuner.divergence(held_out) < 0.9 * unknown
    found = tuner.codes()
    changed = sum(int((found[name].codes != codes.codes).sum()) for name, codes in rounded.items())
    assert (changed > 0) == (reach > 0)
    for name, codes in rounded.items():
        assert torch.equal(found[name].zeros, codes.zeros)
        assert not torch.equal(found[name].scales, codes.scales)
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())


def test_a_tuned_checkpoint_is_read_back_and_computes_as_transformers(
    tiny_llama: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, oracle = tiny_llama[0], copy.deepcopy(tiny_llama[1])
    counted: list[tuple[str, int, int]] = []
    for steps in (0, 12):
        options = QuantizeOptions(bits=2, group_size=16, tune_steps=steps, num_sequences=4)
        quantize_checkpoint(
            FolderSource(folder), SEQUENCES, tmp_path / str(steps), options, lambda *done: counted.append(done)
        )
    assert counted[-13:] == [("linears", 14, 14), *(("steps", done, 12) for done in range(1, 13))]
    plain, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "12"))
    assert plain.keys() == tuned.keys()
    assert [(t.dtype, t.shape) for t in plain.values()] == [(tuned[n].dtype, tuned[n].shape) for n in plain]
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed == {"scales", "weight"}  # no code
    assert all("norm" in n for n in plain if n.endswith(".weight") and not torch.equal(plain[n], tuned[n]))
    source = FolderSource(tmp_path / "12")
    state = {
        name: weight.float() if isinstance(weight, Tensor) else weight.values() for name, weight in source.weights()
    }
    oracle.load_state_dict(state)
    with torch.inference_mode():
        loss = oracle(torch.tensor(SEQUENCES), labels=torch.tensor(SEQUENCES)).loss
    assert perplexity(load_model(source), SEQUENCES) == pytest.approx(float(loss.exp()), rel=1e-4)
    settings = json.loads((tmp_path / "12" / "config.json").read_text())["quantization_config"]
    assert settings["meta"]["tune_steps"] == 12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "awq", "tune_steps": 3}, "tune_steps go with method 'gptq', got 'awq'"),
        ({"tune_steps": -1}, "tune_steps must be 0 or more, got -1"),
    ],
    ids=["awq", "negative"],
)
def test_options_that_do_not_go_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        QuantizeOptions(**values)
