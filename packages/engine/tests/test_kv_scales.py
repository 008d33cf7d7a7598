"""KV caches in 8 bits by a checkpoint's own scales: how they are read and used, and where they are refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

import octavo_kernels
from octavo_engine import LLM, SamplingParams
from octavo_engine.errors import CorruptModelFile, InvalidConfig
from octavo_engine.kv_dtype import check_scales, why_not_kept
from octavo_engine.kv_scales import load_with_scales, read_scales
from octavo_engine.layers import attention
from octavo_engine.models.llama import Llama
from octavo_engine.runner.forward import OpByOp, RecordedForward
from octavo_engine.testing import Driver, make_runner, random_model, tiny_config
from octavo_engine.weights.source import FolderSource

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FP8: 448.0}
ONE = {"k": torch.tensor([0.02]), "v": torch.tensor(0.03)}
PER_HEAD = {"k": torch.tensor([0.02, 0.015]), "v": torch.tensor([0.03, 0.01])}
MakeSource = Callable[..., FolderSource]
SETTINGS: dict[str, Any] = {"quant_method": "fp8", "ignored_layers": []}
native = pytest.mark.skipif(octavo_kernels.cpu_isa() == "none", reason="no native kernels")
quiet = pytest.mark.filterwarnings(
    "ignore:.*torch serves it, not the native library:octavo_kernels.BackendFallbackWarning"
)


@pytest.fixture
def make_source(make_quantised: Callable[..., Any]) -> MakeSource:
    """Return a function that makes a checkpoint in FP8 whose projections have scales for the KV cache too."""

    def make(
        scales: Mapping[str, Tensor], part: str = "{}_scale", settings: Mapping[str, Any] | None = None
    ) -> FolderSource:
        def quantise(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            codes, scale = (weight / 0.01).to(FP8), torch.tensor([0.01])
            parts = {"weight": codes, "weight_scale": scale}
            for which, value in scales.items():
                if name.endswith(f"{which}_proj") and "lm_head" not in name:
                    parts[part.format(which)] = value * (2 if ".layers.1." in name else 1)
            return parts, codes.float() * scale

        return FolderSource(make_quantised(quantise, {**SETTINGS, **(settings or {})}).folder)

    return make


@pytest.mark.parametrize("scales", [ONE, PER_HEAD], ids=["of a layer", "of a head"])
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_scales_are_read_for_each_head(make_source: MakeSource, scales: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Those of FP8 are stretched in a cache of int8: 448 of them is 127 of these."""
    found = read_scales(make_source(scales), dtype)
    assert list(found) == [0, 1]
    for layer, factor in ((0, 1), (1, 2)):
        for which, scale in zip(("k", "v"), found[layer], strict=True):
            torch.testing.assert_close(scale, scales[which].expand(2) * factor * 448 / LARGEST[dtype])
    assert read_scales(make_source(scales), torch.float32) == {}


@pytest.mark.parametrize(
    "settings",
    [{"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}}],
    ids=["compressed-tensors"],
)
def test_scales_of_int8_fit_a_cache_of_int8_as_they_are(make_source: MakeSource, settings: dict[str, Any]) -> None:
    source = make_source(ONE, settings=settings)
    assert read_scales(source, torch.int8)[0].k.tolist() == pytest.approx([0.02, 0.02])
    assert read_scales(source, FP8)[0].k.tolist() == pytest.approx([0.02 * 127 / 448] * 2)


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round [num_tokens, num_kv_heads, head_dim] as a cache by known scales does, in float64."""
    of_head, largest = scale.double()[:, None], LARGEST[dtype]
    codes = (x.double() / of_head).clamp(-largest, largest)
    codes = codes.round() if dtype == torch.int8 else codes.float().to(dtype).double()
    return (codes * of_head).to(x.dtype)


def hidden_states(model: Llama, dtype: torch.dtype, *, op_by_op: bool = True) -> list[Tensor]:
    """Drive two prompts through chunks and decodes; return the hidden states of every step."""
    seen: list[Tensor] = []
    runner = make_runner(model, kv_dtype=dtype)
    forward = model if op_by_op else runner.forward

    def watched(model_input: Any) -> Tensor:
        seen.append(forward(model_input).clone())
        return seen[-1]

    runner.forward = OpByOp(watched, model.greedy)
    driver, source = Driver(runner), random.Random(5)
    for row, length in enumerate((9, 17)):
        driver.add(row, [source.randrange(model.config.vocab_size) for _ in range(length)])
    for step in ({0: 9}, {0: 1, 1: 12}, {0: 1, 1: 5}, {0: 1, 1: 1}):
        driver.step(step)
    return seen


@quiet
@pytest.mark.parametrize("scales", [ONE, PER_HEAD], ids=["of a layer", "of a head"])
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_hidden_states_are_those_of_keys_and_values_rounded_by_the_scales(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, scales: dict[str, Tensor], dtype: torch.dtype
) -> None:
    source = make_source(scales)
    model = load_with_scales(source, kv_dtype=dtype)
    assert isinstance(model, Llama)
    found, exact = hidden_states(model, dtype), hidden_states(model, torch.float32)
    pairs = [layer.attention.kv_scales for layer in model.layers]
    calls = iter(pairs * 4)

    def write(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> None:
        *places, k_cache, v_cache, slots = arguments
        octavo_kernels.rope_kv_write(q, k, v, *places, k_cache, v_cache, torch.full_like(slots, -1))
        k_scale, v_scale = next(calls)
        octavo_kernels.write_kv(rounded(k, k_scale, dtype), rounded(v, v_scale, dtype), k_cache, v_cache, slots)

    monkeypatch.setattr(attention, "rope_kv_write", write)
    expected = hidden_states(model, torch.float32)
    for ours, wanted, unrounded in zip(found, expected, exact, strict=True):
        # A code may be one off where its quotient is near a half: less than a tenth of what rounding does as a whole.
        assert (ours - wanted).abs().mean() < 0.1 * (wanted - unrounded).abs().mean()


@native
def test_a_recorded_step_follows_them_too() -> None:
    model = random_model(tiny_config())
    plain = hidden_states(model, torch.int8, op_by_op=False)
    for layer in model.layers:
        layer.attention.follow(PER_HEAD["k"], PER_HEAD["v"])
    assert isinstance(make_runner(model, kv_dtype=torch.int8).forward, RecordedForward)
    assert not torch.equal(hidden_states(model, torch.int8, op_by_op=False)[-1], plain[-1])
    for ours, expected in zip(
        hidden_states(model, torch.int8, op_by_op=False), hidden_states(model, torch.int8), strict=True
    ):
        assert torch.equal(ours, expected)


@quiet
def test_an_engine_answers_by_them(make_source: MakeSource) -> None:
    def drawn(**options: Any) -> Any:
        with LLM(str(source.path), show_progress=False, num_blocks=9, device="cpu", **options) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
            output = llm.generate([{"prompt_token_ids": [3, 14, 15, 9, 26]}], sampling)[0].outputs[0]
            return [entry.logprob for entry in output.logprobs]

    source = make_source({"k": torch.tensor([1e-4]), "v": torch.tensor([1e-4])})
    tiny = drawn(kv_cache_dtype="int8")  # all is cut to 127 * 448 / 127 * 1e-4
    source = make_source(ONE)
    assert drawn(kv_cache_dtype="int8") != tiny


@pytest.mark.parametrize(
    ("part", "is_read"),
    [("{}_scale", True), ("output_scale", True)],
)
def test_names_of_other_formats(make_source: MakeSource, part: str, is_read: bool) -> None:
    from octavo_engine.kv_scales import _NAME

    for name in ("self_attn.k_scale", "self_attn.attn.k_scale", f"self_attn.k_proj.{part.format('k')}"):
        assert bool(_NAME.search(f"model.layers.3.{name}")) is is_read
    for name in ("self_attn.q_scale", "self_attn.o_proj.output_scale", "self_attn.k_proj.weight_scale"):
        assert not _NAME.search(f"model.layers.3.{name}")


def test_what_is_missing_or_no_scale_is_named(make_source: MakeSource) -> None:
    with pytest.raises(CorruptModelFile, match=r"layer 0 has no scale of v .* such as model\.layers\.0\..*k_scale"):
        read_scales(make_source({"k": ONE["k"]}), torch.int8)
    with pytest.raises(CorruptModelFile, match=r"k_scale' has shape \[3\], expected one number or 2"):
        read_scales(make_source({"k": torch.ones(3), "v": ONE["v"]}), torch.int8)
    with pytest.raises(CorruptModelFile, match=r"v_proj\.v_scale': expected finite numbers above 0"):
        read_scales(make_source({"k": ONE["k"], "v": torch.tensor([0.0])}), torch.int8)


def test_a_split_model_and_zero_points_are_refused(make_source: MakeSource) -> None:
    source = make_source(ONE)
    assert why_not_kept(source, torch.int8) is None
    expected = "has 4 scales for a KV cache, such as model.layers.0.self_attn.k_proj.k_scale, and a KV cache of int8"
    with pytest.raises(InvalidConfig, match=re.escape(f"{expected} split over processes does not follow them")):
        check_scales(source, torch.int8, num_ranks=2)
    check_scales(source, torch.float32, num_ranks=2)
