"""A mixture split over ranks by experts answers as in one process, under the rule of ties, and counts its load."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")


from octavo_engine import LLM, EngineConfig, InvalidConfig, RankMismatch, SamplingParams
from octavo_engine.expert_stats import ExpertStats
from octavo_engine.parallel import job, split
from octavo_engine.parallel.plan import ShardPlan, check_size
from octavo_engine.parallel.shard import PartOfSource
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.testing import tiny_config
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import open_source

TIE = 5e-4
PROMPTS = [tuple((7 * i + j) % 131 for j in range(length)) for i, length in enumerate([1, 5, 16, 17, 40])]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
EXPERTS = "model.layers.1.block_sparse_moe.experts"
MIXTURE = replace(tiny_config(), architecture="MixtralForCausalLM", num_experts=5, num_experts_per_token=2)
Made = tuple[Path, Any]
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def folders(make_mixtral: Callable[..., Made]) -> dict[str, Path]:
    """Experts that two ranks share evenly, and such as they cannot, which are stored in stacks."""
    four = make_mixtral(num_key_value_heads=4)[0]
    return {"4 experts": four, "3 experts": make_mixtral(num_local_experts=3, stacked=True)[0]}


@pytest.fixture
def make(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make engines whose ranks are threads, and which are closed at the end."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    made: list[LLM] = []

    def make(size: int, folder: str = "4 experts", **options: Any) -> LLM:
        defaults = {"num_blocks": 65, "max_num_seqs": 8, "num_threads": 1, "show_progress": False}
        defaults |= {"expert_parallel": size > 1}
        made.append(LLM(str(folders[folder]), tensor_parallel_size=size, **{**defaults, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def run(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams = GREEDY) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling)
    return [output.outputs[0] for output in outputs]


def check_greedy(whole: LLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
    """Each token of the answers is the likeliest of the model in one piece, or as good as equal to it."""
    outputs = whole.generate(
        [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in zip(prompts, answers, strict=True)],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        for entry in output.prompt_logprobs[len(prompt) :]:
            assert entry is not None
            assert entry.top[0][1] - entry.logprob <= TIE


@pytest.mark.parametrize(
    ("folder", "size", "expert_parallel", "backend"),
    [
        ("4 experts", 2, True, ""),
        ("4 experts", 4, True, ""),
        ("4 experts", 2, True, "reference"),
        ("3 experts", 2, True, ""),
        ("3 experts", 2, False, ""),
    ],
)
def test_ranks_draw_the_tokens_of_one_process(
    make: Make, monkeypatch: pytest.MonkeyPatch, folder: str, size: int, expert_parallel: bool, backend: str
) -> None:
    """Whether a rank has whole experts or a part of each."""
    if backend:
        monkeypatch.setenv("OCTAVO_BACKEND", backend)
    llm = make(size, folder, expert_parallel=expert_parallel, max_num_batched_tokens=32)
    answers = [completion.token_ids for completion in run(llm, PROMPTS)]
    assert all(len(answer) == 10 for answer in answers)
    check_greedy(make(1, folder), PROMPTS, answers)


def test_tokens_do_not_depend_on_company(make: Make) -> None:
    """Bit for bit: the ranks' parts are added in one order, whatever the number of tokens."""
    llm = make(2, max_num_batched_tokens=48, prefix_cache=False)
    sampling = replace(GREEDY, logprobs=1)
    together = run(llm, PROMPTS, sampling)
    for prompt, completion in zip(PROMPTS[::2], together[::2], strict=True):
        (alone,) = run(llm, [prompt], sampling)
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


def test_the_load_of_all_experts_is_counted_at_rank_0(make: Make, folders: dict[str, Path]) -> None:
    """The same as in one process: two layers, in which every computed token goes to two experts."""
    whole, parts = make(1, prefix_cache=False), make(2, prefix_cache=False)
    assert whole.stats().experts.num_tokens == ((0,) * 4,) * 2
    for llm in (whole, parts):
        run(llm, PROMPTS)
    num_computed = sum(len(prompt) + 10 - 1 for prompt in PROMPTS)
    experts = whole.stats().experts
    assert [sum(layer) for layer in experts.num_tokens] == [2 * num_computed] * 2
    assert parts.stats().experts == experts
    assert 1 < experts.imbalance <= 2


def test_imbalance_is_the_share_of_the_busiest() -> None:
    assert ExpertStats().imbalance == 1
    assert ExpertStats(((0, 0),)).imbalance == 1
    assert ExpertStats(((5, 5, 5, 5), (0, 0, 0, 0))).imbalance == 1
    assert ExpertStats(((6, 2), (8, 0))).imbalance == (1.5 + 2) / 2


@pytest.mark.parametrize("expert_parallel", [True, False], ids=["whole experts", "parts of experts"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_its_share_of_the_files(folders: dict[str, Path], size: int, expert_parallel: bool) -> None:
    """Within 5 %."""
    source = open_source(folders["4 experts"])
    whole = sum(weight.nbytes for _, weight in source.weights())
    seen: list[tuple[int, int]] = []
    for rank in range(size):
        part = PartOfSource(source, ShardPlan(source.config, rank, size, expert_parallel=expert_parallel))
        load_model(part, progress=lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1] == part.num_weights
        assert part.num_bytes == pytest.approx(whole / size, rel=0.05)


def test_experts_are_dealt_out_in_runs() -> None:
    plans = [ShardPlan(MIXTURE, rank, 2, expert_parallel=True) for rank in range(2)]
    assert [plan.config.own_experts for plan in plans] == [range(2), range(2, 5)]
    assert [plan.config.intermediate_size for plan in plans] == [48, 48]
    assert plans[0](f"{EXPERTS}.1.w1.weight") is None
    names = [f"{EXPERTS}.{expert}.w2.weight" for expert in range(5)]
    assert [[plan.leaves_out(name) for name in names] for plan in plans] == [
        [False, False, True, True, True],
        [True, True, False, False, False],
    ]
    assert plans[1]("model.layers.0.block_sparse_moe.gate.weight") is None
    parts = ShardPlan(MIXTURE, 1, 2)
    assert parts.config.own_experts is None
    assert parts(f"{EXPERTS}.4.w3.weight") == Cut(0, 24, 48, 48)
    assert parts(f"{EXPERTS}.4.w2.weight") == Cut(1, 24, 48, 48)
    assert not any(parts.leaves_out(name) for name in names)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="expert_parallel needs tensor_parallel_size 2 or more, got 1"):
        EngineConfig(expert_parallel=True)
    with pytest.raises(InvalidConfig, match="expert_parallel needs a mixture of experts, m has none"):
        check_size(tiny_config(), 2, lambda name: 1, "m", expert_parallel=True)
    few = replace(MIXTURE, num_heads=8, num_experts=2)
    with pytest.raises(InvalidConfig, match=r"size 4 does not fit m: .* and 2 experts; .* an expert; use 1 or 2$"):
        check_size(few, 4, lambda name: 1, "m", expert_parallel=True)
    wide = replace(MIXTURE, intermediate_size=96)
    with pytest.raises(InvalidConfig, match=r"96 feed-forward columns, .*use 1$"):
        check_size(wide, 2, lambda name: 32 if ".w2." in name else 1, "m")
    check_size(wide, 2, lambda name: 32 if ".w2." in name else 1, "m", expert_parallel=True)


def test_ranks_that_could_choose_other_experts_do_not_join(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own = job.native_isa()
    monkeypatch.setattr(split, "native_isa", lambda: "another")
    with pytest.raises(RankMismatch, match=f"rank 0 computes with another, this rank with {own or 'torch'}"):
        make(2)


def test_experts_of_other_ranks_are_left_out(folders: dict[str, Path]) -> None:
    """Of stacks, too, a rank takes its experts alone."""
    source = open_source(folders["3 experts"])
    for rank, own in enumerate((range(1), range(1, 3))):
        part = PartOfSource(source, ShardPlan(source.config, rank, 2, expert_parallel=True))
        names = {name for name, _ in part.weights() if ".experts." in name}
        assert names == {
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{kind}.weight"
            for layer in range(2) for expert in own for kind in ("w1", "w2", "w3")
        }  # fmt: skip
