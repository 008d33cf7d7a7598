"""Adapters in an engine, against Transformers with each merged into the base by hand, in float32."""

import asyncio
import copy
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import octavo_kernels
from octavo_engine import (
    LLM,
    AsyncEngine,
    BeamSearchParams,
    EngineConfig,
    InvalidAdapter,
    InvalidRequest,
    RequestOutput,
    SamplingParams,
    UnknownAdapter,
)
from octavo_engine.runner import adapter_pool
from octavo_engine.runner.forward import OpByOp, RecordedForward, make_forward

VOCAB_SIZE = 131
NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TIE = 1e-3
"""Logits that lie this close are a tie: they are sums in float32, in another order, of numbers of size 10."""

Checkpoint = tuple[Path, Any]
Write = Callable[..., dict[str, Any]]
Merge = Callable[..., Any]

on_a_cpu = pytest.mark.skipif(os.environ.get("OCTAVO_BACKEND", "cpu") != "cpu", reason="only `cpu` promises bits")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="too slow in the interpreter")


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    defaults = {"num_blocks": 400, "max_num_seqs": 40, "max_num_batched_tokens": 128, "enable_lora": True}
    with LLM(str(folder), show_progress=False, **{**defaults, **options}) as llm:
        yield llm


def prompts(num: int, length: int = 20) -> list[dict[str, list[int]]]:
    source = random.Random(3)
    return [
        {"prompt_token_ids": [source.randrange(VOCAB_SIZE) for _ in range(source.randint(3, length))]}
        for _ in range(num)
    ]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check(model: Any, output: RequestOutput) -> None:
    """Check that each token of a greedy answer is the model's likeliest, or ties with it."""
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    assert len(answer) == NUM_TOKENS
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    assert gaps.max() <= TIE


def test_32_adapters_and_base_rows_in_one_batch_equal_each_merged_into_the_base(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    names = [None if i % 9 == 8 else f"adapter-{i}" for i in range(36)]
    with engine(folder, max_loras=32) as llm:
        models = {None: model}
        for i, name in enumerate(names):
            if name is not None:
                models[name] = merged(model, write_adapter(tmp_path / name, model, seed=i))
                llm.load_adapter(name, str(tmp_path / name))
        outputs = llm.generate(prompts(36), GREEDY, adapter=names)
        assert llm.stats().adapters.num_fills == 32
        assert llm.stats().cache.num_used == 0
    for name, output in zip(names, outputs, strict=True):
        check(models[name], output)
    assert len({tuple(tokens) for tokens in tokens_of(outputs)}) == 36


@on_a_cpu
def test_base_rows_beside_adapters_have_the_bits_of_a_batch_without(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    write_adapter(tmp_path / "a", model, seed=1)
    exact = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
    with engine(folder, enable_lora=False) as llm:
        expected = [output.outputs for output in llm.generate(prompts(6), exact)]
    with engine(folder) as llm:
        llm.load_adapter("a", str(tmp_path / "a"))
        mixed = llm.generate([p for p in prompts(6) for _ in "ab"], exact, adapter=["a", None] * 6)
        alone = [llm.generate(prompt, exact, adapter="a")[0] for prompt in prompts(6)]
    assert [output.outputs for output in mixed[1::2]] == expected
    assert [output.outputs for output in mixed[::2]] == [output.outputs for output in alone]


@pytest.mark.skipif(octavo_kernels.cpu_isa() == "none", reason="no native kernels")
@on_a_cpu
@pytest.mark.parametrize("lora_dtype", ["auto", "bfloat16"])
def test_recorded_steps_with_adapters_have_the_bits_of_steps_op_by_op(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_dtype: str
) -> None:
    folder, model = tiny_llama
    for i, name in enumerate("ab"):
        write_adapter(tmp_path / name, model, seed=i)
    exact = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
    made: list[type] = []
    found = []
    for make in (make_forward, lambda model, *_: OpByOp(model, model.greedy)):

        def watched(*arguments: Any, make: Callable[..., Any] = make) -> Any:
            forward = make(*arguments)
            made.append(type(forward))
            return forward

        monkeypatch.setattr(adapter_pool, "make_forward", watched)
        with engine(folder, lora_dtype=lora_dtype) as llm:
            for name in "ab":
                llm.load_adapter(name, str(tmp_path / name))
            outputs = llm.generate(prompts(9), exact, adapter=["a", None, "b"] * 3)
            outputs += llm.generate(prompts(9), GREEDY, adapter=["a", None, "b"] * 3)
            found.append([output.outputs for output in outputs])
    assert made == [RecordedForward, OpByOp]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_of_16_bits_are_multiplied_as_they_are(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path, dtype: str
) -> None:
    folder, model = tiny_llama
    matrices = write_adapter(tmp_path / "a", model, seed=1, dtype=dtype)
    for lora_dtype in ("auto", dtype):
        with engine(folder, lora_dtype=lora_dtype) as llm:
            llm.load_adapter("a", str(tmp_path / "a"))
            for output in llm.generate(prompts(3), GREEDY, adapter="a"):
                check(merged(model, matrices), output)


def test_patterns_of_ranks_and_alphas_and_rslora_mean_what_peft_means(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    matrices = write_adapter(
        tmp_path / "a",
        model,
        seed=5,
        names=("q_proj", "v_proj", "down_proj"),
        ranks={"q_proj": 8, "down_proj": 2},
        rank_pattern={"q_proj": 8, r"layers\.\d+\.mlp\.down_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 3},
        use_rslora=True,
    )

    def scale(name: str) -> float:
        if name == "model.layers.1.self_attn.v_proj":
            return 3 / 4**0.5
        return 8 / {"q_proj": 8, "v_proj": 4, "down_proj": 2}[name.rpartition(".")[2]] ** 0.5

    with engine(folder) as llm:
        assert llm.load_adapter("a", str(tmp_path / "a")).rank == 8
        for output in llm.generate(prompts(4), GREEDY, adapter="a"):
            check(merged(model, matrices, scale), output)


def test_biases_take_the_places_of_the_base_s_own(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    generator = torch.Generator().manual_seed(3)
    queries = {f"model.layers.{i}.self_attn.q_proj": torch.randn(64, generator=generator) for i in range(2)}
    downs = {f"model.layers.{i}.mlp.down_proj": torch.randn(64, generator=generator) for i in range(2)}
    matrices = write_adapter(
        tmp_path / "a",
        model,
        seed=6,
        names=("q_proj", "down_proj"),
        bias="lora_only",
        lora_bias=True,
        extra={
            **{f"base_model.model.{name}.base_layer.bias": bias for name, bias in queries.items()},
            **{f"base_model.model.{name}.lora_B.bias": bias for name, bias in downs.items()},
        },
    )
    expected = merged(model, matrices)
    for name, bias in queries.items():
        expected.get_submodule(name).bias.data = bias
    for name, bias in downs.items():
        expected.get_submodule(name).bias = torch.nn.Parameter(2.0 * bias)
    write_adapter(tmp_path / "plain", model, seed=7)
    with engine(folder, max_loras=1) as llm:
        llm.load_adapter("a", str(tmp_path / "a"))
        llm.load_adapter("plain", str(tmp_path / "plain"))
        before = tokens_of(llm.generate(prompts(4), GREEDY, adapter="plain"))
        outputs = llm.generate(prompts(4), GREEDY, adapter=["a", None, "a", None])
        llm.reset_prefix_cache()
        assert tokens_of(llm.generate(prompts(4), GREEDY, adapter="plain")) == before
    for output, oracle in zip(outputs, [expected, model] * 2, strict=True):
        check(oracle, output)


def test_what_peft_saves_gives_the_logits_that_peft_gives(tiny_llama: Checkpoint, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle")
    warnings.simplefilter("ignore")  # PEFT's own
    folder, model = tiny_llama
    kinds = {
        "all-linear": {"target_modules": "all-linear", "r": 8, "lora_alpha": 4},
        "regex": {"target_modules": r".*\.layers\.1\.(self_attn\.[qk]|mlp\.up)_proj", "r": 3, "use_rslora": True},
        "layers": {"target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [1], "r": 4},
        "patterns": {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 16},
            "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 24, "q_proj": 1},
        },
        "bias": {"target_modules": ["q_proj", "v_proj"], "bias": "all", "r": 4},
        "dora": {"target_modules": ["k_proj", "o_proj", "gate_proj", "down_proj"], "use_dora": True, "r": 4},
    }
    for name, settings in kinds.items():
        torch.manual_seed(len(name))
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings, init_lora_weights=False)).eval()
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad and "bias" in key:
                parameter.data.normal_(0, 0.5)
            if "magnitude" in key:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        adapted.save_pretrained(tmp_path / name)
        with engine(folder) as llm:
            llm.load_adapter(name, str(tmp_path / name))
            for output in llm.generate(prompts(4), GREEDY, adapter=name):
                check(adapted, output)


def test_no_adapter_hits_the_prefixes_of_another_or_of_the_base(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    a, b = (write_adapter(tmp_path / "x", model, seed=1), write_adapter(tmp_path / "y", model, seed=2))
    shutil.copytree(tmp_path / "x", tmp_path / "same")
    (prompt,) = prompts(1, 3)
    prompt["prompt_token_ids"] += range(60)
    with engine(folder) as llm:
        for name in ("x", "y", "same"):
            llm.load_adapter(name, str(tmp_path / name))
        for name, oracle in ((None, model), ("x", merged(model, a)), ("y", merged(model, b))):
            (first,), (second,) = (llm.generate(prompt, GREEDY, adapter=name) for _ in range(2))
            assert first.num_cached_tokens == 0
            assert second.num_cached_tokens == len(prompt["prompt_token_ids"]) - 1
            check(oracle, first)
            check(oracle, second)
        assert llm.generate(prompt, GREEDY, adapter="same")[0].num_cached_tokens > 0  # its content is that of x
        write_adapter(tmp_path / "x", model, seed=2, r=4)
        llm.load_adapter("x", str(tmp_path / "x"), in_place=True)
        (output,) = llm.generate(prompt, GREEDY, adapter="x")
        check(merged(model, b), output)
        assert llm.warm(prompt, adapter="y")[0].cached.total > 0
        kept = llm.generate(prompt, GREEDY, adapter="y", keep=True)[0]
        fork = llm.fork(kept.branch(at=4), GREEDY, adapter="y")[0]
        assert fork.cached.fork > 0
        check(merged(model, b), fork)
        other = llm.fork(kept.branch(at=4), GREEDY)[0]
        assert other.cached.fork == 0
        check(model, other)


def test_more_adapters_than_slots_or_host_memory_take_turns(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    names = [f"adapter-{i}" for i in range(7)]
    matrices = {name: write_adapter(tmp_path / name, model, seed=i) for i, name in enumerate(names)}
    with engine(folder, max_loras=2, max_cpu_loras=3) as llm:
        for name in names:
            llm.load_adapter(name, str(tmp_path / name))
        assert [info.name for info in llm.adapters() if info.is_loaded] == names[4:]
        outputs = llm.generate(prompts(14), GREEDY, adapter=names * 2)
        stats = llm.stats()
        assert stats.adapters.num_loaded == 3
        assert stats.adapters.num_reads >= 11
        assert stats.num_held_up["adapters"] > 0
    for name, output in zip(names * 2, outputs, strict=True):
        check(merged(model, matrices[name]), output)


def test_an_adapter_whose_files_changed_while_it_was_out_of_memory_is_not_served(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    for i, name in enumerate("ab"):
        write_adapter(tmp_path / name, model, seed=i)
    with engine(folder, max_loras=1) as llm:
        llm.load_adapter("a", str(tmp_path / "a"))
        llm.load_adapter("b", str(tmp_path / "b"))
        write_adapter(tmp_path / "a", model, seed=9)
        with pytest.raises(InvalidAdapter, match="have changed since adapter 'a' was loaded; load it again in place"):
            llm.generate(prompts(1), GREEDY, adapter="a")
        assert len(llm.generate(prompts(1), GREEDY, adapter="b")) == 1
        llm.load_adapter("a", str(tmp_path / "a"), in_place=True)
        assert len(llm.generate(prompts(1), GREEDY, adapter="a")) == 1


@on_a_cpu
def test_preemption_samples_and_beams_do_not_change_what_an_adapter_says(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    for i, name in enumerate("abc"):
        write_adapter(tmp_path / name, model, seed=i)
    sampled = SamplingParams(n=2, max_tokens=24, ignore_eos=True, seed=4)
    beams = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    found = []
    for num_blocks in (400, 12):
        with engine(folder, max_loras=3, num_blocks=num_blocks, max_model_len=64, prefix_cache=False) as llm:
            for name in "abc":
                llm.load_adapter(name, str(tmp_path / name))
            outputs = llm.generate(prompts(6), sampled, adapter=[*"abc", None, "a", "b"])
            outputs += llm.beam_search(prompts(3), beams, adapter=["a", None, "b"])
            embeddings = llm.embed(prompts(3), adapter=["c", None, "a"])
            found.append(([output.outputs for output in outputs], [e.embedding for e in embeddings]))
            num_preemptions = llm.stats().num_preemptions
    assert num_preemptions > 0
    assert found[0] == found[1]


def test_adapters_are_served_after_a_sleep(tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path) -> None:
    folder, model = tiny_llama
    write_adapter(tmp_path / "a", model, seed=1)
    with engine(folder) as llm:
        llm.load_adapter("a", str(tmp_path / "a"))
        before = tokens_of(llm.generate(prompts(2), GREEDY, adapter="a"))
        llm.sleep()
        llm.wake_up()
        assert tokens_of(llm.generate(prompts(2), GREEDY, adapter="a")) == before
        assert before != tokens_of(llm.generate(prompts(2), GREEDY))


def test_names_that_are_unknown_or_taken_are_refused(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    write_adapter(tmp_path / "a", model, seed=1)
    with engine(folder, enable_lora=False) as llm:
        with pytest.raises(UnknownAdapter, match="start the engine with enable_lora"):
            llm.generate(prompts(1), GREEDY, adapter="a")
        assert llm.adapters() == []
    with engine(folder) as llm:
        with pytest.raises(UnknownAdapter, match="no adapter 'a' is served; none is"):
            llm.generate(prompts(1), GREEDY, adapter="a")
        llm.load_adapter("a", str(tmp_path / "a"))
        with pytest.raises(InvalidRequest, match="'a' is served already; load it in place"):
            llm.load_adapter("a", str(tmp_path / "a"))
        with pytest.raises(InvalidRequest, match="2 prompts and 1 adapters"):
            llm.generate(prompts(2), GREEDY, adapter=["a"])
        with pytest.raises(UnknownAdapter, match="'b' is served; these are: 'a'"):
            llm.unload_adapter("b")
        llm.unload_adapter("a")
        assert llm.adapters() == []
        assert llm.stats().adapters.num_loaded == 0


@on_a_cpu
@pytest.mark.parametrize("num_swaps", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_content_swapped_under_load_never_mixes_and_never_hits_stale_kv(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Merge, tmp_path: Path, num_swaps: int
) -> None:
    folder, model = tiny_llama
    contents = [tmp_path / f"content-{i}" for i in range(4)]
    models = [merged(model, write_adapter(path, model, seed=i)) for i, path in enumerate(contents)]
    asked = prompts(3, 40)
    with engine(folder) as llm:
        for i, path in enumerate(contents):
            llm.load_adapter(str(i), str(path))
        expected = [llm.generate(asked, GREEDY, adapter=str(i)) for i in range(4)]
    for i, outputs in enumerate(expected):
        for output in outputs:
            check(models[i], output)
    answers = [tokens_of(outputs) for outputs in expected]
    assert len({tuple(tokens) for each in answers for tokens in each}) == 12

    config = EngineConfig(
        model=str(folder), num_blocks=400, max_num_seqs=40, max_num_batched_tokens=32, enable_lora=True, max_loras=3
    )
    found = asyncio.run(swap_under_load(config, contents, asked, num_swaps))
    assert len(found) == 3 * (num_swaps + 1)
    for version, place, tokens in found:
        assert tokens == answers[version][place]


async def swap_under_load(
    config: EngineConfig, contents: list[Path], asked: list[dict[str, list[int]]], num_swaps: int
) -> list[tuple[int, int, list[int]]]:
    """Swap an adapter's content and send requests, without waiting for those that run.

    Return each request's version, the current one when it was sent, its prompt and its tokens.
    """
    source = random.Random(9)
    running = AsyncEngine.from_config(config)
    try:
        await running.load_adapter("x", str(contents[0]))

        async def ask(version: int, place: int, name: str) -> tuple[int, int, list[int]]:
            request = running.text.make_request(asked[place]["prompt_token_ids"], GREEDY, request_id=name, adapter="x")
            tokens: list[int] = []
            async for deltas in running.generate(request):
                tokens += [token for delta in deltas for token in delta.token_ids]
            return version, place, tokens

        tasks: list[asyncio.Task[tuple[int, int, list[int]]]] = []
        version = 0
        for swap in range(num_swaps + 1):
            if swap:
                version = source.choice([other for other in range(4) if other != version])
                await running.load_adapter("x", str(contents[version]), in_place=True)
            tasks += [asyncio.create_task(ask(version, place, f"{swap}-{place}")) for place in range(3)]
            await asyncio.sleep(0)  # so that they are added before the next swap
            for _ in range(source.randrange(4)):  # and some steps are made
                await running.timeline("none")
            if swap % 10 == 9:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        found = [await task for task in tasks]
        stats = running.stats()
        assert stats.num_cached_prompt_tokens > 0
        assert stats.adapters.num_active == 0
        assert [info.name for info in running.adapters()] == ["x"]
        return found
    finally:
        running.close()
