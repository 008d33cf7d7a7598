"""A model put aside and brought back in this process: what is freed, what is served after, and what is refused."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

from octavo_engine import LLM, EngineAsleep, IncompatibleWeights, SamplingParams
from octavo_engine.errors import CorruptModelFile, InvalidRequest, ModelNotFound
from octavo_engine.runner import model_host
from octavo_engine.text.fingerprint import fingerprint
from octavo_engine.weights.source import open_source

MakeGGUF = Callable[..., Path]
PROMPTS = [{"prompt_token_ids": [5, 6, 7, 200, 9, *range(20, 60)]}, {"prompt_token_ids": [5, 6, 7, 200, 9, 11]}]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, seed=1)


def tiny_llm(path: Path, **options: Any) -> LLM:
    return LLM(str(path), num_blocks=17, max_num_seqs=2, show_progress=False, **options)


def answers(llm: LLM) -> list[Any]:
    return [output.outputs for output in llm.generate(PROMPTS, GREEDY)]


def fresh_answers(path: Path) -> list[Any]:
    with tiny_llm(path) as llm:
        return answers(llm)


@pytest.mark.parametrize("level", [1, 2])
def test_what_wakes_is_what_slept(make_gguf: MakeGGUF, level: int) -> None:
    with tiny_llm(make_gguf()) as llm:
        before, digest = answers(llm), llm.info.weights_digest
        kept = llm.generate(PROMPTS[0], GREEDY, keep=True)[0]
        assert llm.sleep(level).sleep_level == level
        assert llm.is_sleeping
        with pytest.raises(EngineAsleep, match=f"level {level}.*wake_up"):
            answers(llm)
        assert llm.stats().cache.num_used == 0
        assert llm.wake_up().sleep_level == 0
        assert not llm.is_sleeping
        num_cached = llm.stats().num_cached_prompt_tokens
        fork = llm.fork(kept.branch(at=0), GREEDY)[0]
        assert fork.outputs == kept.outputs
        llm.reset_prefix_cache()
        assert answers(llm) == before
        assert llm.stats().num_cached_prompt_tokens - num_cached < len(PROMPTS[0]["prompt_token_ids"])
        assert llm.info.weights_digest == digest


def test_an_unknown_level_is_refused(make_gguf: MakeGGUF) -> None:
    with tiny_llm(make_gguf()) as llm, pytest.raises(InvalidRequest, match="level must be 1"):
        llm.sleep(3)


def test_weights_whose_scales_would_not_be_followed_are_refused(
    make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_llm(make_gguf(), kv_cache_dtype="int8") as llm:
        monkeypatch.setattr(model_host, "why_not_kept", lambda source, dtype: f"{source.name} has scales, not {dtype}")
        with pytest.raises(IncompatibleWeights, match=r"has scales, not torch\.int8; start an engine of its own"):
            llm.update_weights_from_disk(str(make_gguf(seed=7, name="new.gguf")))


def test_other_weights_answer_as_a_fresh_engine_and_hit_nothing_of_the_old_ones(make_gguf: MakeGGUF) -> None:
    old, new = make_gguf(), make_gguf(seed=7, name="new.gguf")
    expected = fresh_answers(new)
    with tiny_llm(old) as llm:
        before = answers(llm)
        assert before != expected
        llm.pin(PROMPTS[0])
        answers(llm)
        num_cached = llm.stats().num_cached_prompt_tokens
        assert num_cached > 0
        report = llm.update_weights_from_disk(str(new))
        assert llm.pins() == []
        assert report.weights_digest == llm.info.weights_digest == open_source(new).digest.hex()
        assert answers(llm) == expected
        assert llm.stats().num_cached_prompt_tokens == num_cached
        llm.update_weights_from_disk(str(old))
        assert answers(llm) == before


def test_an_engine_that_sleeps_takes_other_weights_and_wakes_with_them(make_gguf: MakeGGUF) -> None:
    new = make_gguf(seed=7, name="new.gguf")
    with tiny_llm(make_gguf()) as llm:
        llm.sleep(2)
        assert llm.update_weights_from_disk(str(new)).sleep_level == 2
        llm.wake_up()
        assert answers(llm) == fresh_answers(new)


def test_files_that_changed_in_sleep_wake_at_level_2_alone(make_gguf: MakeGGUF) -> None:
    path = make_gguf()
    with tiny_llm(path) as llm:
        answers(llm)
        llm.sleep(1)
        make_gguf(seed=7)
        with pytest.raises(IncompatibleWeights, match="have changed while the engine slept"):
            llm.wake_up()
        assert llm.is_sleeping
        llm.sleep(2)
        llm.wake_up()
        assert answers(llm) == fresh_answers(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count_kv": 2}, "num_kv_heads 1 .*found 2"),
        ({"llama.context_length": 64}, "max_position_embeddings 128 .*found 64"),
        ({"tokenizer.ggml.eos_token_id": 0}, "its tokenizer is another"),
    ],
    ids=["shape", "context", "tokenizer"],
)
def test_weights_of_another_model_are_refused_and_the_old_ones_serve_on(
    make_gguf: MakeGGUF, metadata: dict[str, Any], message: str
) -> None:
    other = make_gguf(metadata, name="other.gguf")
    with tiny_llm(make_gguf()) as llm:
        before = answers(llm)
        with pytest.raises(IncompatibleWeights, match=message):
            llm.update_weights_from_disk(str(other))
        assert answers(llm) == before
        assert llm.stats().num_cached_prompt_tokens > 0


def test_files_that_cannot_be_read_leave_the_old_weights_serving(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    with tiny_llm(make_gguf()) as llm:
        before = answers(llm)
        broken.write_bytes(make_gguf(name="whole.gguf").read_bytes()[:-4000])
        with pytest.raises(CorruptModelFile):
            llm.update_weights_from_disk(str(broken))
        with pytest.raises(ModelNotFound):
            llm.update_weights_from_disk(str(tmp_path / "gone.gguf"))
        assert answers(llm) == before


def test_a_runner_that_cannot_be_made_leaves_the_old_one_in_place(
    make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_llm(make_gguf()) as llm:
        before = answers(llm)
        host = llm._engine.standby._host
        monkeypatch.setattr(host, "_parts", _without_memory(host._parts))
        with pytest.raises(MemoryError):
            llm.update_weights_from_disk(str(make_gguf(seed=7, name="new.gguf")))
        assert answers(llm) == before


def _without_memory(parts: Any) -> Any:
    def make_runner(model: Any, storage: Any) -> Any:
        raise MemoryError

    return replace(parts, make_runner=make_runner)


def test_tokenizers_are_told_apart_by_vocabulary_merges_and_special_tokens(make_gguf: MakeGGUF) -> None:
    plain = fingerprint(open_source(make_gguf()).tokenizer())
    assert fingerprint(open_source(make_gguf(seed=7)).tokenizer()) == plain
    for metadata in ({"tokenizer.ggml.bos_token_id": 0}, {"tokenizer.ggml.pre": "gpt-2"}):
        assert fingerprint(open_source(make_gguf(metadata)).tokenizer()) != plain


@pytest.mark.model
def test_sleep_gives_the_memory_of_the_weights_back(demo_path: Path) -> None:
    with LLM(str(demo_path), show_progress=False, kv_cache_bytes=64 << 20, max_model_len=512) as llm:
        gc.freeze()  # as a server does
        try:
            asleep = llm.sleep()
        finally:
            gc.unfreeze()
        assert asleep.freed_bytes is None or asleep.freed_bytes > demo_path.stat().st_size


@pytest.mark.model
@pytest.mark.slow
def test_sleeping_again_and_again_takes_no_more_memory_and_changes_no_answer(demo_path: Path) -> None:
    with LLM(str(demo_path), show_progress=False, kv_cache_bytes=64 << 20, max_model_len=512) as llm:
        prompt = {"prompt_token_ids": list(range(300, 400))}
        before = llm.generate(prompt, GREEDY)[0].outputs
        reports = []
        for level in (1, 2, 1, 2, 1):
            reports.append(llm.sleep(level))
            llm.wake_up()
            assert llm.generate(prompt, GREEDY)[0].outputs == before
        if reports[0].bytes_after is not None:
            assert reports[-1].bytes_after - reports[1].bytes_after < 32 << 20


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_with_other_weights_answers_as_a_fresh_engine(demo_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(demo_path, other)
    info = open_source(demo_path).file.tensors["output_norm.weight"]
    with other.open("r+b") as file:
        file.seek(info.offset)
        values = torch.frombuffer(bytearray(file.read(info.num_bytes)), dtype=torch.float32)
        file.seek(info.offset)
        file.write((values * torch.linspace(0.5, 1.5, len(values))).numpy().tobytes())
    options = {"show_progress": False, "kv_cache_bytes": 64 << 20, "max_model_len": 512}
    with LLM(str(other), **options) as fresh:
        expected = answers(fresh)
    with LLM(str(demo_path), **options) as llm:
        before = answers(llm)
        llm.update_weights_from_disk(str(other))
        assert answers(llm) == expected != before
