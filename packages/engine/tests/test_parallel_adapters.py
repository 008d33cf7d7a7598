"""Adapters of a model that is split over ranks: tokens as of one process with the same adapters, under the tie rule."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import torch

from octavo_engine import LLM, InvalidAdapter, SamplingParams
from octavo_engine.adapters.weights import AdapterWeights, LowRank
from octavo_engine.parallel import split
from octavo_engine.parallel.adapters import decode, encode, part_of
from octavo_engine.parallel.plan import ShardPlan
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.weights.source import open_source

TIE = 1e-3
NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
VOCAB_SIZE = 131
KINDS = ("plain", "biased", "dora", "few")

Checkpoint = tuple[Path, Any]
Write = Callable[..., dict[str, Any]]
Make = Callable[..., LLM]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make engines whose ranks are threads, and which are closed at the end."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    made: list[LLM] = []

    def make(path: Path, size: int, **options: Any) -> LLM:
        defaults = {"num_blocks": 200, "max_num_seqs": 8, "num_threads": 1, "show_progress": False}
        llm = LLM(str(path), tensor_parallel_size=size, enable_lora=True, **{**defaults, **options})
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


def write_all(write_adapter: Write, folder: Path, model: Any) -> None:
    """Write adapters on all linears, with biases, with magnitudes, and on some linears of one layer."""
    generator = torch.Generator().manual_seed(3)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    biases = {
        f"base_model.model.{name}.base_layer.bias": torch.randn(len(linear.weight), generator=generator)
        for name, linear in linears.items()
        if linear.bias is not None
    }
    extra = {
        f"base_model.model.{name}.lora_B.bias": torch.randn(len(linear.weight), generator=generator)
        for name, linear in linears.items()
    }
    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": linear.weight.detach().norm(dim=1)
        * (torch.rand(len(linear.weight), generator=generator) + 0.5)
        for name, linear in linears.items()
    }
    write_adapter(folder / "plain", model, seed=1)
    write_adapter(folder / "biased", model, seed=2, bias="all", lora_bias=True, extra={**biases, **extra})
    write_adapter(folder / "dora", model, seed=3, use_dora=True, extra=magnitudes)
    write_adapter(folder / "few", model, seed=4, names=("k_proj", "down_proj"), ranks={"k_proj": 4, "down_proj": 4})


def prompts(count: int) -> list[dict[str, list[int]]]:
    source = random.Random(5)
    return [
        {"prompt_token_ids": [source.randrange(VOCAB_SIZE) for _ in range(source.randint(3, 20))]} for _ in range(count)
    ]


def answers_of(llm: LLM, asked: list[Any], order: list[str | None]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(asked, GREEDY, adapter=order)]


def check(whole: LLM, asked: list[Any], answers: list[list[int]], order: list[str | None]) -> None:
    """Each token of the answers is the likeliest of the model in one piece, or as good as equal to it."""
    longer = [
        {"prompt_token_ids": prompt["prompt_token_ids"] + answer} for prompt, answer in zip(asked, answers, strict=True)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for prompt, output in zip(asked, whole.generate(longer, sampling, adapter=order), strict=True):
        assert output.prompt_logprobs is not None
        for entry in output.prompt_logprobs[len(prompt["prompt_token_ids"]) :]:
            assert entry is not None
            assert entry.top[0][1] - entry.logprob <= TIE


@pytest.mark.parametrize("size", [2, 4], ids=["KV heads of their own", "KV heads that ranks share"])
def test_ranks_with_adapters_draw_the_tokens_of_one_process(
    make: Make, tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path, size: int
) -> None:
    folder, model = tiny_llama
    write_all(write_adapter, tmp_path, model)
    asked = prompts(10)
    split_up, whole = make(folder, size, max_loras=2), make(folder, 1, max_loras=8)
    for llm in (split_up, whole):
        for name in KINDS:
            llm.load_adapter(name, str(tmp_path / name))
    for order in ([None, "plain", "biased", "plain", None] * 2, ["dora", "few", None, "plain", "dora"] * 2):
        answers = answers_of(split_up, asked, order)
        assert all(len(answer) == NUM_TOKENS for answer in answers)
        check(whole, asked, answers, order)
    of_base = answers_of(split_up, asked, [None] * 10)  # nothing stays of the steps before
    check(whole, asked, of_base, [None] * 10)
    assert answers_of(split_up, asked, ["plain"] * 10) != of_base


def test_ranks_that_were_replaced_get_the_adapters_again(
    make: Make, tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    write_all(write_adapter, tmp_path, model)
    asked, order = prompts(4), ["plain", "dora", None, "plain"]
    llm = make(folder, 2, prefix_cache=False)
    for name in KINDS:
        llm.load_adapter(name, str(tmp_path / name))
    before = answers_of(llm, asked, order)
    llm._engine._executor._team.restart()
    assert answers_of(llm, asked, order) == before


def test_content_that_is_loaded_in_place_reaches_all_ranks(
    make: Make, tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    write_all(write_adapter, tmp_path, model)
    asked = prompts(4)
    split_up, whole = make(folder, 2), make(folder, 1)
    for name in ("plain", "few", "plain"):
        for llm in (split_up, whole):
            llm.load_adapter("a", str(tmp_path / name), in_place=True)
        check(whole, asked, answers_of(split_up, asked, ["a"] * 4), ["a"] * 4)


def test_an_adapter_with_a_head_is_refused_by_a_model_that_is_split(
    make: Make, tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    head = {"base_model.model.lm_head.weight": torch.zeros(131, 64)}
    write_adapter(tmp_path, model, seed=1, extra=head, modules_to_save=["lm_head"])
    with pytest.raises(InvalidAdapter, match=r"modules_to_save: .* the head: .* leave out tensor_parallel_size"):
        make(folder, 2).load_adapter("a", str(tmp_path))


@pytest.mark.model
def test_adapters_of_a_quantised_base_on_three_ranks(make: Make, demo_path: Path, tmp_path: Path) -> None:
    """Blocks of 4 bits; 9 query and 3 KV heads."""
    from safetensors.torch import save_file

    config = open_source(str(demo_path)).config
    hidden, mlp, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    sizes = {"q_proj": (hidden, hidden), "v_proj": (hidden, kv), "o_proj": (hidden, hidden), "down_proj": (mlp, hidden)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config.num_layers):
        for name, (num_inputs, num_outputs) in sizes.items():
            block = "mlp" if name == "down_proj" else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, num_inputs, generator=generator) * num_inputs**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_outputs, 8, generator=generator) * 0.5
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": {list(sizes)}}}'.replace("'", '"')
    )
    asked = [{"prompt_token_ids": ids} for ids in ([504, 3575, 282, 4649, 314], [2, 8, 27], [*range(1000, 1020)])]
    order = ["a", None, "a"]
    split_up, whole = make(demo_path, 3), make(demo_path, 1)
    for llm in (split_up, whole):
        llm.load_adapter("a", str(tmp_path))
    answers = answers_of(split_up, asked, order)
    check(whole, asked, answers, order)
    assert answers[0] != answers_of(split_up, asked[:1], [None])[0]


def test_ranks_have_parts_of_the_matrices_alone(tiny_llama: Checkpoint) -> None:
    """Together the parts are the adapter, and as bytes each is what it was."""
    folder, _ = tiny_llama
    generator = torch.Generator().manual_seed(1)
    sizes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "self_attn.o_proj": (64, 64)}
    sizes |= {"mlp.up_proj": (64, 80), "mlp.down_proj": (80, 64)}
    modules = {
        f"model.layers.0.{name}": LowRank(
            torch.randn(3, num_inputs, generator=generator),
            torch.randn(num_outputs, 3, generator=generator),
            0.1,
            torch.rand(num_outputs, generator=generator),
        )
        for name, (num_inputs, num_outputs) in sizes.items()
    }
    biases = {name: torch.rand(len(module.b), generator=generator) for name, module in modules.items()}
    extra = {name: bias.clone() for name, bias in biases.items()}
    whole = AdapterWeights(bytes(range(32)), modules, biases, extra)
    config = open_source(str(folder)).config
    parts = [decode(encode(part_of(whole, ShardPlan(config, rank, 4)))) for rank in range(4)]
    for name, module in modules.items():
        own = [part.modules[name] for part in parts]
        assert all(part.scale == module.scale for part in own)
        by_columns = name.endswith(("o_proj", "down_proj"))
        a = torch.cat([part.a for part in own], dim=1) if by_columns else own[0].a
        rows = own if not name.endswith("k_proj") else own[::2]  # two ranks share a KV head
        b = own[0].b if by_columns else torch.cat([part.b for part in rows])
        magnitude = own[0].magnitude if by_columns else torch.cat([part.magnitude for part in rows])
        assert torch.equal(a, module.a)
        assert torch.equal(b, module.b)
        assert torch.equal(magnitude, module.magnitude)
        ranks = [part for part in parts if name in part.biases]
        assert len(ranks) == (1 if by_columns else 4)
        ranks = ranks[::2] if name.endswith("k_proj") else ranks
        for kind in ("biases", "extra_biases"):
            assert torch.equal(torch.cat([getattr(part, kind)[name] for part in ranks]), biases[name])
    assert {part.digest for part in parts} == {whole.digest}
