"""Mixtral from files: experts stored one by one or stacked, rounded as they are read, run against Transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from safetensors.torch import load_file, save_file

from octavo_engine import LLM, SamplingParams, assembly
from octavo_engine.errors import CorruptModelFile, IncompatibleWeights, InvalidAdapter, UnsupportedModel
from octavo_engine.models.mixtral import Mixtral
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.quantize import quantize_checkpoint
from octavo_engine.quant.choose import has_native_products
from octavo_engine.testing import Driver, make_runner
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource, open_source
from octavo_engine.weights.stored import StoredTensor

Made = tuple[Path, Any]
PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79], [1] * 20, list(range(40, 77))]
EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def stacked(make_mixtral: Callable[..., Made]) -> Made:
    return make_mixtral(stacked=True)


def test_greedy_tokens_are_those_of_transformers(tiny_mixtral: Made) -> None:
    """With chunks of prompts beside decodes, preemption and hits in the cache."""
    folder, model = tiny_mixtral
    llm = LLM(str(folder), show_progress=False, num_blocks=9, max_num_batched_tokens=16)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in [*PROMPTS, PROMPTS[3]]],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    )
    for prompt, output in zip([*PROMPTS, PROMPTS[3]], outputs, strict=True):
        with torch.inference_mode():
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert list(output.outputs[0].token_ids) == expected[0, len(prompt) :].tolist()
    llm.close()


def test_stacked_experts_are_those_that_are_stored_one_by_one(tiny_mixtral: Made, stacked: Made) -> None:
    sources = [FolderSource(made[0]) for made in (tiny_mixtral, stacked)]
    one_by_one, unstacked = (dict(source.weights()) for source in sources)
    assert f"{EXPERTS}.3.w2.weight" in one_by_one
    assert unstacked.keys() == one_by_one.keys()
    for name, weight in one_by_one.items():
        assert torch.equal(weight, unstacked[name]), name
    assert [source.num_weights for source in sources] == [len(one_by_one)] * 2
    seen: list[tuple[int, int]] = []
    answers = []
    for source in sources:
        model = load_model(source, progress=lambda done, total: seen.append((done, total)))
        assert isinstance(model, Mixtral)
        assert seen[-1] == (len(one_by_one), len(one_by_one))
        driver = Driver(make_runner(model))
        driver.add(0, PROMPTS[0])
        answers.append(driver.generate(8))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "cut"),
    [("w1", Cut(0, 24, 48, 96)), ("w3", Cut(0, 0, 48, 96)), ("w2", Cut(1, 48, 96, 96))],
    ids=["gate", "up", "down"],
)
def test_parts_of_stacked_experts_are_read(stacked: Made, name: str, cut: Cut) -> None:
    source, weight = FolderSource(stacked[0]), f"{EXPERTS}.2.{name}.weight"
    whole = dict(source.weights())[weight]
    part = dict(source.weights(lambda found: cut if found == weight else None))[weight]
    assert torch.equal(part, whole[cut.span] if cut.axis == 0 else whole[:, cut.span])
    with pytest.raises(CorruptModelFile, match=rf"{weight}.*expected 95 "):
        dict(source.weights(lambda found: cut._replace(total=95) if found == weight else None))


WRONG_STACKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fewer experts": lambda stack: stack[:3],
    "no stack": lambda stack: stack.flatten(0, 1),
    "rows that do not halve": lambda stack: stack[:, 1:],
}


@pytest.mark.parametrize("change", WRONG_STACKS.values(), ids=WRONG_STACKS)
def test_a_stack_of_another_shape_is_corrupt(
    stacked: Made, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensors = load_file(stacked[0] / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((stacked[0] / "config.json").read_bytes())
    message = rf"model.safetensors: tensor '{name}': expected shape \[4 experts, 2 x rows, columns\], found"
    with pytest.raises(CorruptModelFile, match=message):
        load_model(FolderSource(tmp_path))


def test_a_missing_expert_is_named(tiny_mixtral: Made, tmp_path: Path) -> None:
    tensors = load_file(tiny_mixtral[0] / "model.safetensors")
    del tensors[f"{EXPERTS}.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_mixtral[0] / "config.json").read_bytes())
    with pytest.raises(CorruptModelFile, match=rf"expected tensor '{EXPERTS}.2.w3.weight' .*found none$"):
        load_model(FolderSource(tmp_path))


def test_more_experts_for_a_token_than_there_are_is_corrupt(tiny_mixtral: Made, tmp_path: Path) -> None:
    values = json.loads((tiny_mixtral[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_experts_per_tok": 5}))
    with pytest.raises(CorruptModelFile, match=r"config.json: expected up to 4096 experts.* found 5 of 4"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_are_rounded_as_other_linears_are(stacked: Made, kind: str) -> None:
    if not has_native_products(torch.device("cpu")):
        pytest.skip("rounding is for native kernels")
    llm = LLM(str(stacked[0]), show_progress=False, num_blocks=32, quantization=kind)
    model = llm._engine._executor._runner.model
    layer = model.layers[1]
    parts = [block.down.parameters.parts for block in layer.mlp.experts.blocks]
    expected = {"int8": "q8_0", "int4": "q4_1"}[kind]
    assert [part.weight.format.value for (part,) in parts] == [expected] * 4
    (router,) = layer.mlp.router.linear.parameters.parts
    assert router.weight.format.value == "f32"
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], SamplingParams(temperature=0, max_tokens=4)
    )
    assert all(output.outputs[0].token_ids for output in outputs)
    llm.close()


def test_a_rounded_expert_is_the_block_that_ggml_makes(stacked: Made) -> None:
    from octavo_engine.quant.online import quantize_online

    name = f"{EXPERTS}.0.w1.weight"
    weights = quantize_online(FolderSource(stacked[0]).weights(), {name}, "int8", "here")
    rounded = dict(weights)[name]
    assert isinstance(rounded, StoredTensor)
    plain = dict(FolderSource(stacked[0]).weights())[name]
    assert (rounded.values() - plain).abs().max() <= plain.abs().max() / 127


def test_adapters_change_attention_and_are_refused_for_experts(
    tiny_mixtral: Made, write_adapter: Callable[..., Any], merged: Callable[..., Any], tmp_path: Path
) -> None:
    folder, model = tiny_mixtral
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    tuned = merged(model, write_adapter(tmp_path / "a", model, seed=1, names=names))
    stem = f"base_model.model.{EXPERTS}.0.w1"
    extra = {f"{stem}.lora_A.weight": torch.zeros(4, 64), f"{stem}.lora_B.weight": torch.zeros(96, 4)}
    write_adapter(tmp_path / "b", model, seed=1, names=names, extra=extra)
    with LLM(str(folder), show_progress=False, num_blocks=32, enable_lora=True) as llm:
        llm.load_adapter("a", str(tmp_path / "a"))
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS * 2],
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
            adapter=[*["a"] * len(PROMPTS), *[None] * len(PROMPTS)],
        )
        with pytest.raises(InvalidAdapter, match=rf"'{EXPERTS}.0.w1', which the model does not have"):
            llm.load_adapter("b", str(tmp_path / "b"))
    expected = [
        which.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        for which in (tuned, model)
        for prompt in PROMPTS
    ]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_what_sizing_computes_is_not_counted(tiny_mixtral: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a step is tried to see what it takes."""
    real = assembly.free_memory_beside

    def tried(model: Mixtral, *arguments: Any, **options: Any) -> Any:
        for _, mixture in model.mixtures():
            mixture(torch.zeros(3, 64))
        return real(model, *arguments, **options)

    monkeypatch.setattr(assembly, "free_memory_beside", tried)
    with LLM(str(tiny_mixtral[0]), show_progress=False, num_blocks=9) as llm:
        assert llm.stats().experts.num_tokens == ((0,) * 4,) * 2
    assert llm.stats().experts.num_tokens == ()


def test_weights_with_other_experts_do_not_replace_a_mixture(
    tiny_mixtral: Made, make_mixtral: Callable[..., Made]
) -> None:
    with LLM(str(tiny_mixtral[0]), show_progress=False, num_blocks=9) as llm:
        for sizes, message in (
            ({"num_local_experts": 3}, "num_experts 4 .*found 3"),
            ({"num_experts_per_tok": 1}, "num_experts_per_token 2 .*found 1"),
        ):
            with pytest.raises(IncompatibleWeights, match=f"expected {message}"):
                llm.update_weights_from_disk(str(make_mixtral(**sizes)[0]))


def test_calibration_refuses_a_mixture(tiny_mixtral: Made, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="expected a model without experts, got a mixture of 4"):
        quantize_checkpoint(open_source(tiny_mixtral[0]), [], tmp_path / "new", QuantizeOptions(method="rtn"))
