"""Building an engine: what mode, dtype and device come to, and what its description says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

from octavo_engine import LLM, SamplingParams, assembly, text_side
from octavo_engine.api import EngineInfo
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.quant import choose
from octavo_engine.runner.late_device import LateDevice
from octavo_kvcache import CacheManager

MakeGGUF = Callable[..., Path]
PROMPT = {"prompt_token_ids": [5, 6, 7, 200, 9]}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that there are native kernels; whatever serves the cpu backend's ops computes."""
    monkeypatch.setattr(choose, "cpu_isa", lambda: "avx2")


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "cpu_isa", lambda: "none")


def info_of(path: Path, **options: Any) -> EngineInfo:
    return build_engine(EngineConfig(model=str(path), num_blocks=17, max_num_seqs=2, **options)).info


def test_exact_keeps_activations_and_kv_in_float32(make_gguf: MakeGGUF, native: None) -> None:
    info = info_of(make_gguf())
    assert (info.mode, info.dtype, info.kv_dtype) == ("exact", "float32", "float32")
    assert info.kv_cache_bytes == 17 * 16 * 2 * 32 * 4
    assert info.kernel_backend in ("cpu (avx2)", "reference")


def test_fast_keeps_kv_in_bfloat16(make_gguf: MakeGGUF, native: None) -> None:
    info = info_of(make_gguf(), mode="fast")
    assert (info.mode, info.dtype, info.kv_dtype) == ("fast", "float32", "bfloat16")
    assert info.kv_cache_bytes == 17 * 16 * 2 * 32 * 2


def test_torch_alone_is_named(make_gguf: MakeGGUF, torch_alone: None) -> None:
    assert info_of(make_gguf()).kernel_backend in ("cpu (torch)", "reference")


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_both_modes_generate(make_gguf: MakeGGUF, native: None, mode: str) -> None:
    with LLM(str(make_gguf()), mode=mode, num_blocks=17, max_num_seqs=2, show_progress=False) as llm:
        (output,) = llm.generate([PROMPT], GREEDY)
    assert len(output.outputs[0].token_ids) == 6


def test_modes_and_dtypes_share_no_cached_kv(
    make_gguf: MakeGGUF, native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots: list[bytes] = []

    def record(*arguments: Any, root: bytes, **options: Any) -> CacheManager:
        roots.append(root)
        return CacheManager(*arguments, root=root, **options)

    monkeypatch.setattr(assembly, "CacheManager", record)
    for options in ({}, {"mode": "fast"}, {"dtype": "bfloat16"}, {}):
        info_of(make_gguf(), **options)
    assert len(roots) == 4
    assert len(set(roots)) == 3
    assert roots[0] == roots[3]


def test_fast_without_native_kernels_is_refused(make_gguf: MakeGGUF, torch_alone: None) -> None:
    with pytest.raises(InvalidConfig, match="mode 'fast' needs the native CPU kernels"):
        info_of(make_gguf(), mode="fast")


def test_fast_is_for_float32_activations(make_gguf: MakeGGUF, native: None) -> None:
    with pytest.raises(InvalidConfig, match="mode 'fast' computes in float32, dtype bfloat16 was asked for"):
        info_of(make_gguf(), mode="fast", dtype="bfloat16")


def test_fast_is_for_cpus(make_gguf: MakeGGUF) -> None:
    with pytest.raises(InvalidConfig, match="mode 'fast' is for CPUs, the device is meta"):
        info_of(make_gguf(), mode="fast", device="meta")


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(InvalidConfig, match="mode 'quick' is not one of exact, fast"):
        EngineConfig(mode="quick")


def test_the_models_own_sampling_defaults_are_taken_and_told(caplog: pytest.LogCaptureFixture) -> None:
    advised = {"temperature": 0.6, "top_k": 20, "typical_p": 0.9, "top_p": None, "min_p": 7, "do_sample": True}
    with caplog.at_level("INFO"):
        taken = text_side._default_sampling(advised)
    assert taken == {"temperature": 0.6, "top_k": 20, "typical_p": 0.9}
    refused, told = caplog.messages
    assert refused == "generation_config.json is not followed: min_p must be between 0 and 1, got 7"
    assert told == "sampling defaults from generation_config.json: temperature=0.6, top_k=20, typical_p=0.9"


def test_the_host_tier_is_described(make_gguf: MakeGGUF) -> None:
    path = make_gguf()
    assert (info_of(path).num_host_blocks, info_of(path).host_kv_bytes) == (0, 0)
    info = info_of(path, host_kv_bytes=100_000)
    assert info.num_host_blocks == 100_000 // (info.kv_cache_bytes // 17)
    assert info.host_kv_reason == "host_kv_bytes was given"
    with pytest.raises(InvalidConfig, match="preemption_mode 'swap' needs memory of the host: the device's memory"):
        info_of(path, preemption_mode="swap")


def test_device_that_computes_late_gives_the_same_tokens(make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(path: Path) -> tuple[list[tuple[int, ...]], int]:
        with LLM(str(path), num_blocks=40, max_num_seqs=4, show_progress=False) as llm:
            before = llm.generate([PROMPT, {"prompt_token_ids": [9, 8]}], GREEDY)
            llm.sleep(level=1)
            llm.wake_up()
            outputs = before + llm.generate([PROMPT], SamplingParams(n=2, seed=1, max_tokens=6, ignore_eos=True))
            tokens = [tuple(one.token_ids) for output in outputs for one in output.outputs]
            return tokens, llm.stats().overlap.num_overlapped

    path = make_gguf()
    inline = answers(path)
    monkeypatch.setattr(assembly, "_overlapping", lambda device: LateDevice(num_late=3))
    late = answers(path)
    assert late[0] == inline[0]
    assert (inline[1], late[1] > 10) == (0, True)
