"""How layers are shared out among stages, and that each stage reads its own part of the files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="weights need the extra octavo-engine[local]")

import torch
from safetensors.torch import save_file

from octavo_engine.errors import CorruptModelFile, InvalidConfig
from octavo_engine.models.llama_stage import LlamaStage
from octavo_engine.parallel.links import Links
from octavo_engine.parallel.plan import ShardPlan
from octavo_engine.parallel.shard import PartOfSource
from octavo_engine.parallel.stages import Stage, plan_stages, share_out
from octavo_engine.parallel.torchrun import TorchrunRank
from octavo_engine.testing import random_weights, tiny_config
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource, GGUFSource

MakeGGUF = Callable[..., Path]


def heaviest(weights: list[int], cuts: tuple[int, ...]) -> int:
    bounds = [0, *cuts, len(weights)]
    return max(sum(weights[start:stop]) for start, stop in pairwise(bounds))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_has_a_lighter_heaviest_run(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 30, rng.integers(1, 9)).tolist()
    for size in range(1, len(weights) + 1):
        runs = share_out(weights, size)
        assert [index for start, stop in runs for index in range(start, stop)] == list(range(len(weights)))
        assert all(start < stop for start, stop in runs)
        every_cut = combinations(range(1, len(weights)), size - 1)
        assert max(sum(weights[a:b]) for a, b in runs) == min(heaviest(weights, cuts) for cuts in every_cut)


def test_of_equally_heavy_cuts_the_evenest_is_taken() -> None:
    assert share_out([5, 1, 1, 1, 1], 3) == [(0, 1), (1, 3), (3, 5)]


def stages_of(num_layers: int, size: int, *, tied: bool = False, embedding: int = 0, head: int = 0) -> list[range]:
    config = replace(tiny_config(tie_word_embeddings=tied), num_layers=num_layers)
    num_bytes = {f"model.layers.{layer}.mlp.up_proj.weight": 10 for layer in range(num_layers)}
    num_bytes |= {"model.embed_tokens.weight": embedding, "model.norm.weight": 0, "lm_head.weight": head}
    return [range(stage.start, stage.stop) for stage in plan_stages(config, num_bytes, size, "m")]


def test_embedding_and_head_count() -> None:
    assert stages_of(8, 2) == [range(4), range(4, 8)]
    assert stages_of(8, 2, embedding=40, head=20) == [range(3), range(3, 8)]
    assert stages_of(8, 2, tied=True, embedding=40) == [range(4), range(4, 8)]
    assert stages_of(8, 4, tied=True, embedding=20, head=99) == [range(1), range(1, 4), range(4, 7), range(7, 8)]


def test_more_stages_than_layers_are_refused_with_the_sizes_that_work() -> None:
    with pytest.raises(InvalidConfig, match=r"pipeline_parallel_size 4 does not fit m: it has 3 layers.*use 1 to 3$"):
        stages_of(3, 4)
    with pytest.raises(InvalidConfig, match=r"it has 1 layers, .*; use 1$"):
        stages_of(1, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_a_stage_and_a_tied_embedding_two(tied: bool) -> None:
    config = replace(tiny_config(tie_word_embeddings=tied), num_layers=5)
    stages = [Stage(0, 1, 5), Stage(1, 4, 5), Stage(4, 5, 5)]
    for name in random_weights(config):
        keepers = [index for index, stage in enumerate(stages) if stage.keeps(name, tied=tied)]
        assert keepers == ([0, 2] if tied and "embed_tokens" in name else keepers[:1])
        assert len(keepers) > 0
    assert [stage.keeps("lm_head.weight", tied=True) for stage in stages] == [False] * 3
    assert [stage.keeps("model.layers.7.mlp.up_proj.weight", tied=tied) for stage in stages] == [False, False, True]


def test_ranks_stand_in_rows_of_stages_and_rank_0_in_the_last() -> None:
    links = [Links(rank, 2, 3) for rank in range(6)]
    assert [(one.stages.rank, one.tensors.rank) for one in links] == [(2, 0), (2, 1), (1, 0), (1, 1), (0, 0), (0, 1)]
    assert {(one.stages.size, one.tensors.size, one.orders.size) for one in links} == {(3, 2, 6)}


@pytest.fixture
def folder(save_llama: Callable[..., Path]) -> Path:
    """A model of four layers whose embedding and head are as large as each other."""
    return save_llama(4)


def stages_of_source(source: FolderSource | GGUFSource, size: int) -> tuple[Stage, ...]:
    return plan_stages(source.config, source.num_bytes(), size, source.name)


def load_stage(part: PartOfSource, stage: Stage) -> LlamaStage:
    model = load_model(part, make_model=partial(LlamaStage, layers=range(stage.start, stage.stop)))
    assert isinstance(model, LlamaStage)
    return model


@pytest.mark.parametrize(("tp_size", "num_stages"), [(1, 2), (2, 2), (1, 4)])
def test_a_rank_reads_and_keeps_its_share_of_the_weights(folder: Path, tp_size: int, num_stages: int) -> None:
    source = FolderSource(folder)
    whole = sum(weight.nbytes for _, weight in source.weights())
    num_read = 0
    for stage in stages_of_source(source, num_stages):
        for tp_rank in range(tp_size):
            part = PartOfSource(source, ShardPlan(source.config, tp_rank, tp_size), stage)
            model = load_stage(part, stage)
            kept = sum(4 * slot.num_parameters for slot in model.slots())
            assert kept == part.num_bytes
            if num_stages == 2:  # four cannot be even, as those in the middle have neither embedding nor head
                assert kept == pytest.approx(whole / (tp_size * num_stages), rel=0.05)
            num_read += kept
    num_norms = (tp_size - 1) * (2 * 4 + 1) * source.config.hidden_size * 4  # of each rank
    assert num_read - num_norms == whole


def test_what_a_stage_does_not_have_takes_no_memory(folder: Path) -> None:
    source = FolderSource(folder)
    first, last = stages_of_source(source, 2)
    for stage, others in ((first, ["norm", "head"]), (last, ["embedding"])):
        model = load_stage(PartOfSource(source, ShardPlan(source.config, 0, 1), stage), stage)
        assert len(model.layers) == len(model.kv_cache_specs(torch.float32)) == 2
        weights = {"norm": model.norm.weight, "embedding": model.embedding.parameters, "head": model.head.parameters}
        assert [name for name in weights if is_elsewhere(weights[name])] == others


def is_elsewhere(parameters: object) -> bool:
    tensor = parameters if isinstance(parameters, torch.Tensor) else getattr(parameters, "weight", None)
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"


def test_other_stages_tensors_are_not_touched(
    folder: Path, make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GGUF file no byte of theirs is asked for; of a folder theirs do not come."""
    touched: list[str] = []
    source = GGUFSource(make_gguf())
    raw = source.file.raw
    monkeypatch.setattr(source.file, "raw", lambda name: touched.append(name) or raw(name))
    stage = Stage(0, 0, 1)  # the embedding alone
    part = PartOfSource(source, ShardPlan(source.config, 0, 1), stage)
    assert [name for name, _ in part.weights()] == ["model.embed_tokens.weight"]
    assert part.num_weights == 1
    assert touched == ["token_embd.weight"]
    names = [name for name, _ in FolderSource(folder).weights(keep=lambda name: ".1." in name)]
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)


def test_sizes_are_read_off_the_headers(folder: Path, make_gguf: MakeGGUF) -> None:
    for source in (FolderSource(folder), GGUFSource(make_gguf())):
        weights = {name: getattr(weight, "rows", weight).nbytes for name, weight in source.weights()}
        assert source.num_bytes() == weights


def test_a_layer_too_many_is_found_by_the_last_stage(folder: Path) -> None:
    config = replace(tiny_config(), num_layers=4)
    extra = {"model.layers.4.input_layernorm.weight": torch.ones(config.hidden_size)}
    save_file(random_weights(config) | extra, folder / "model.safetensors")
    source = FolderSource(folder)
    part = PartOfSource(source, ShardPlan(source.config, 0, 1), Stage(2, 4, 4))
    with pytest.raises(CorruptModelFile, match=r"'model\.layers\.4\.input_layernorm\.weight' .* has no place"):
        load_stage(part, Stage(2, 4, 4))


def test_torchrun_starts_as_many_as_both_sizes_make() -> None:
    rank = TorchrunRank(rank=1, size=4, local_rank=0, host="first", port=1)
    rank.check_size(2, 2)
    rank.check_size(4)
    message = (
        "torchrun has started 4 processes, tensor_parallel_size 2 x pipeline_parallel_size 3 needs 6; start as many"
    )
    with pytest.raises(InvalidConfig, match=message):
        rank.check_size(2, 3)
    with pytest.raises(InvalidConfig, match="started 4 processes, pipeline_parallel_size 2 needs 2; start as many"):
        rank.check_size(1, 2)
