"""KV caches in 8 bits: what they hold, what they take, and that swaps, copies and recordings change nothing of it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

import octavo_kernels
from octavo_engine import LLM, SamplingParams, assembly, kv_dtype
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.layers import attention
from octavo_engine.models.llama import Llama
from octavo_engine.runner.forward import OpByOp, RecordedForward
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.testing import Driver, make_runner, random_model, tiny_config
from octavo_engine.weights.source import FolderSource
from octavo_kvcache import CacheManager

HEAD_DIM = 32  # of the small GGUF file
MakeGGUF = Callable[..., Path]
STEPS = [{0: 9, 1: 1}, {0: 1, 1: 1, 2: 30}, {0: 1, 1: 1, 2: 7}, {0: 1, 1: 1, 2: 1}, {1: 1}]
native = pytest.mark.skipif(octavo_kernels.cpu_isa() == "none", reason="no native kernels")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(tiny_config())


def hidden_states(model: Llama, dtype: torch.dtype, *, op_by_op: bool = False) -> list[Tensor]:
    """Drive three prompts through chunks and decodes; return the hidden states of every step."""
    seen: list[Tensor] = []

    def watch(_: ModelInput, hidden: Tensor) -> None:
        seen.append(hidden.clone())

    runner = make_runner(model, kv_dtype=dtype, watch=watch)
    if op_by_op:

        def plain(model_input: ModelInput) -> Tensor:
            hidden = model(model_input)
            watch(model_input, hidden)
            return hidden

        runner.forward = OpByOp(plain, model.greedy)
    driver = Driver(runner)
    source = random.Random(5)
    for row, length in enumerate((9, 1, 37)):
        driver.add(row, [source.randrange(model.config.vocab_size) for _ in range(length)])
    for step in STEPS:
        driver.step(step)
    return seen


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round vectors as a cache does, in float64: by their largest element over the largest code."""
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    scales = x.double().abs().amax(dim=-1, keepdim=True) / largest
    codes = x.double() / scales
    codes = codes.round() if dtype == torch.int8 else codes.float().to(dtype).double()
    return (codes * scales).to(x.dtype)


@pytest.mark.filterwarnings("ignore:.*torch serves it, not the native library:octavo_kernels.BackendFallbackWarning")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_hidden_states_are_those_of_keys_and_values_rounded_vector_by_vector(
    model: Llama, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    found, exact = hidden_states(model, dtype, op_by_op=True), hidden_states(model, torch.float32, op_by_op=True)

    def write(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> None:
        *places, k_cache, v_cache, slots = arguments
        octavo_kernels.rope_kv_write(q, k, v, *places, k_cache, v_cache, torch.full_like(slots, -1))
        octavo_kernels.write_kv(rounded(k, dtype), rounded(v, dtype), k_cache, v_cache, slots)

    monkeypatch.setattr(attention, "rope_kv_write", write)
    expected = hidden_states(model, torch.float32, op_by_op=True)
    for ours, wanted, unrounded in zip(found, expected, exact, strict=True):
        # A code may be one off where its quotient is near a half: less than a tenth of what rounding does as a whole.
        assert (ours - wanted).abs().mean() < 0.1 * (wanted - unrounded).abs().mean()
        assert (ours - unrounded).abs().max() < 0.5


@native
def test_a_recorded_step_has_the_bits_of_one_run_op_by_op(model: Llama) -> None:
    assert isinstance(make_runner(model, kv_dtype=torch.int8).forward, RecordedForward)
    recorded = hidden_states(model, torch.int8)
    for ours, expected in zip(recorded, hidden_states(model, torch.int8, op_by_op=True), strict=True):
        assert torch.equal(ours, expected)


def test_forks_copy_codes_with_their_scales(model: Llama) -> None:
    """Each sample writes to its own copy of the prompt's last block, and goes on as one that is alone."""
    token_ids, drawn = list(range(20, 30)), SamplingParams(temperature=1.0)

    def driver_of(*rows: tuple[int, int], **fork: int) -> Driver:
        driver = Driver(make_runner(model, kv_dtype=torch.int8))
        for place, (row, index) in enumerate(rows):
            driver.add(row, token_ids, drawn, seed=9, sequence_index=index, **(fork if place else {}))
        return driver

    answers = driver_of((2, 0), (0, 1), (7, 2), fork_of=2).generate(8)
    for row, index in ((2, 0), (0, 1), (7, 2)):
        assert answers[row] == driver_of((0, index)).generate(8)[0]
    assert len({tuple(answer) for answer in answers.values()}) == 3


def info_of(path: Path, **options: Any) -> Any:
    return build_engine(EngineConfig(model=str(path), num_blocks=17, max_num_seqs=2, **options)).info


@pytest.mark.parametrize("mode", ["exact", pytest.param("fast", marks=native)])
def test_int8_takes_a_byte_and_a_share_of_a_scale(make_gguf: MakeGGUF, mode: str) -> None:
    path = make_gguf()
    whole, info = info_of(path), info_of(path, kv_cache_dtype="int8", mode=mode)
    assert (whole.kv_dtype, info.kv_dtype, info.mode) == ("float32", "int8", mode)
    num_vectors = whole.kv_cache_bytes // (4 * HEAD_DIM)
    assert info.kv_cache_bytes == num_vectors * (HEAD_DIM + 4)
    assert info.deterministic == whole.deterministic


def test_memory_given_in_bytes_holds_more_blocks(make_gguf: MakeGGUF) -> None:
    path = make_gguf()
    numbers = {
        dtype: build_engine(
            EngineConfig(model=str(path), kv_cache_bytes=1 << 20, max_num_seqs=2, kv_cache_dtype=dtype)
        ).info.num_blocks
        for dtype in ("float32", "bfloat16", "int8")
    }
    assert numbers["float32"] < numbers["bfloat16"] < numbers["int8"]


def test_every_kv_dtype_has_a_prefix_cache_of_its_own(make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[bytes] = []

    def record(*arguments: Any, root: bytes, **options: Any) -> CacheManager:
        roots.append(root)
        return CacheManager(*arguments, root=root, **options)

    monkeypatch.setattr(assembly, "CacheManager", record)
    for dtype in ("auto", "float32", "bfloat16", "int8"):
        info_of(make_gguf(), kv_cache_dtype=dtype)
    assert roots[0] == roots[1]
    assert len(set(roots)) == 3


def test_swapped_and_cached_int8_blocks_give_the_tokens_of_a_run_with_room(make_gguf: MakeGGUF) -> None:
    options = {"kv_cache_dtype": "int8", "block_size": 8, "max_model_len": 48, "max_num_seqs": 8}
    prompts = [{"prompt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, *range(14, 14 + n)]} for n in range(6)]
    sampling = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=24, ignore_eos=True, logprobs=2)

    def run(**more: Any) -> tuple[list[Any], Any]:
        with LLM(str(make_gguf()), show_progress=False, **options, **more) as llm:
            outputs = [llm.generate(prompts, sampling) for _ in range(2)]
            found = [(c.token_ids, c.logprobs) for batch in outputs for output in batch for c in output.outputs]
            return found, llm.stats()

    expected, _ = run(num_blocks=200, prefix_cache=False)
    found, stats = run(num_blocks=14, host_kv_bytes=1 << 20, preemption_mode="swap")
    assert stats.preemption.num_swapped > 0
    assert found == expected


def test_fp8_is_for_gpus_that_compute_with_it(make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match=r"kv_cache_dtype 'fp8' needs a GPU, the device is cpu.*use int8"):
        info_of(make_gguf(), kv_cache_dtype="fp8", device="cpu")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(InvalidConfig, match=r"compute capability 8.9 or newer, cuda has 8\.0; use int8"):
        kv_dtype.resolve_kv_dtype("fp8", cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert kv_dtype.resolve_kv_dtype("fp8", cuda, torch.bfloat16) == torch.float8_e4m3fn
    assert kv_dtype.resolve_kv_dtype("auto", cuda, torch.bfloat16) == torch.bfloat16


def test_an_unknown_kv_dtype_names_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="kv_cache_dtype 'int4' is not one of auto, float32, bfloat16, int8, fp8"):
        EngineConfig(kv_cache_dtype="int4")


@pytest.fixture
def scaled(make_quantised: Callable[..., Any]) -> FolderSource:
    """A checkpoint with a scale for the keys of each of its two layers."""

    def quantise(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale = (weight / 0.01).to(torch.float8_e4m3fn), torch.tensor([0.01])
        parts = {"weight": codes, "weight_scale": scale}
        if name.endswith("k_proj"):
            parts["k_scale"] = torch.tensor([0.02])
        return parts, codes.float() * scale

    return FolderSource(make_quantised(quantise, {"quant_method": "fp8", "ignored_layers": []}).folder)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_zero_points_of_a_checkpoint_are_refused(
    scaled: FolderSource, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    name = "model.layers.0.self_attn.k_zero_point"
    monkeypatch.setattr(type(scaled.files), "names", [*scaled.files.names, name])
    expected = (
        f"has 1 zero points or second factors for a KV cache, such as {name}, and a KV cache of {dtype} does not "
        "follow them; leave kv_cache_dtype auto"
    )
    with pytest.raises(InvalidConfig, match=re.escape(expected)):
        kv_dtype.check_scales(scaled, getattr(torch, dtype))


def test_scales_that_nothing_needs_are_not_passed_over_in_silence(
    scaled: FolderSource, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        kv_dtype.check_scales(scaled, torch.float32)
    (message,) = caplog.messages
    assert "has 2 scales for a KV cache in 8 bits, such as model.layers.0.self_attn.k_proj.k_scale" in message
    assert message.endswith("which are not used: the KV cache is float32")


@pytest.mark.parametrize(
    ("name", "is_scale"),
    [
        ("model.layers.0.self_attn.k_scale", True),
        ("model.layers.0.self_attn.attn.v_scale", True),
        ("model.layers.0.self_attn.v_proj.v_scale", True),
        ("model.layers.0.self_attn.k_global_scale", True),
        ("model.layers.0.self_attn.k_zero_point", True),
        ("model.layers.0.self_attn.k_proj.output_scale", True),
        ("model.layers.0.self_attn.o_proj.output_scale", False),
        ("model.layers.0.self_attn.k_proj.weight_scale", False),
        ("model.layers.0.self_attn.q_scale", False),
    ],
)
def test_scales_of_a_kv_cache_are_told_by_their_names(name: str, is_scale: bool) -> None:
    assert bool(kv_dtype._SCALES_OF_CHECKPOINTS.search(name)) is is_scale


def test_a_checkpoint_without_scales_is_not_spoken_of(make_gguf: MakeGGUF, caplog: pytest.LogCaptureFixture) -> None:
    info_of(make_gguf(), kv_cache_dtype="int8")
    assert not any("scales" in message for message in caplog.messages)
