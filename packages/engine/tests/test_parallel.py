"""A model split over ranks answers as in one piece: tokens under the rule of ties, in float32, on every backend."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import torch
from tokenizers import Tokenizer, decoders, models

from octavo_engine import LLM, BeamSearchParams, InvalidConfig, InvalidRequest, SamplingParams
from octavo_engine.parallel import split
from octavo_engine.parallel.leader import LeadingModel
from octavo_engine.parallel.plan import ShardPlan
from octavo_engine.parallel.shard import PartOfSource
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.quant.packed import PackedParameters
from octavo_engine.text.byte_alphabet import CHAR_OF_BYTE
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource, open_source

transformers = pytest.importorskip("transformers")

TIE = 5e-4
VOCAB_SIZE = 131
SIZES: dict[str, dict[str, Any]] = {
    "heads_4_kv_4_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "heads_4_kv_2_bias": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}
PROMPTS = [tuple((7 * i + j) % VOCAB_SIZE for j in range(length)) for i, length in enumerate([1, 5, 16, 17, 40, 70])]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with tiny checkpoints, whose vocabulary two and four ranks cannot share evenly."""
    return {name: save_checkpoint(tmp_path_factory.mktemp(name), **sizes) for name, sizes in SIZES.items()}


def save_checkpoint(folder: Path, **sizes: Any) -> Path:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        max_position_embeddings=128,
        **{"num_hidden_layers": 2, "tie_word_embeddings": False, **sizes},
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():  # biases too, which Transformers sets to zero
        parameter.data.normal_(1.0 if parameter.dim() == 1 and len(parameter) == 64 else 0.0, 0.2)
    model.save_pretrained(folder)
    vocabulary = {char: token_id for token_id, char in enumerate([*CHAR_OF_BYTE.values()][:VOCAB_SIZE])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def make(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make engines whose ranks are threads, and which are closed at the end."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    made: list[LLM] = []

    def make(size: int, checkpoint: str = "heads_4_kv_2_bias", **options: Any) -> LLM:
        defaults = {"num_blocks": 65, "max_num_seqs": 8, "num_threads": 1, "show_progress": False}
        path = checkpoints.get(checkpoint, checkpoint)
        made.append(LLM(str(path), tensor_parallel_size=size, **{**defaults, **options}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def run(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams = GREEDY) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling)
    return [completion for output in outputs for completion in output.outputs]


def tokens_of(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    return [tuple(completion.token_ids) for completion in run(llm, prompts, sampling)]


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
    ("checkpoint", "size", "backend"),
    [
        ("heads_4_kv_4_tied", 2, ""),
        ("heads_4_kv_4_tied", 4, ""),
        ("heads_4_kv_2_bias", 2, "reference"),
        ("heads_4_kv_2_bias", 4, ""),
        ("heads_4_kv_2_bias", 4, "reference"),
    ],
)
def test_ranks_draw_the_tokens_of_one_process(
    make: Make, monkeypatch: pytest.MonkeyPatch, checkpoint: str, size: int, backend: str
) -> None:
    if backend:
        monkeypatch.setenv("OCTAVO_BACKEND", backend)
    llm = make(size, checkpoint, max_num_batched_tokens=32)
    assert llm.info.tensor_parallel_size == size
    answers = tokens_of(llm, PROMPTS)
    assert all(len(answer) == 12 for answer in answers)
    check_greedy(make(1, checkpoint), PROMPTS, answers)


@pytest.mark.model
def test_three_ranks_share_the_demo_model(make: Make, demo_path: Path) -> None:
    """Its blocks of 4 bits are cut by rows and by columns; two ranks could not have whole heads."""
    with pytest.raises(InvalidConfig, match=r"tensor_parallel_size 2 does not fit .*9 query heads, 3 KV.*use 1 or 3$"):
        make(2, str(demo_path))
    prompts = [(504, 3575, 282, 4649, 314), (2, 8, 27), tuple(range(1000, 1020))]
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = tokens_of(make(3, str(demo_path)), prompts, sampling)
    check_greedy(make(1, str(demo_path)), prompts, answers)


def test_what_the_runner_does_is_done_by_all_ranks(make: Make) -> None:
    """Samples and beams copy blocks, embeddings and log-probabilities read hidden states and logits of every token."""
    whole, llm = make(1), make(2)
    drawn = SamplingParams(n=3, seed=7, max_tokens=10, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    for expected, found in zip(run(whole, PROMPTS, drawn), run(llm, PROMPTS, drawn), strict=True):
        assert found.token_ids == expected.token_ids
        pairs = zip(found.logprobs, expected.logprobs, strict=True)
        assert all(abs(one.logprob - other.logprob) < TIE for one, other in pairs)
    beams = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    prompt = [{"prompt_token_ids": list(PROMPTS[3])}]
    searched = [[beam.token_ids for beam in one.beam_search(prompt, beams)[0].outputs] for one in (whole, llm)]
    assert searched[0] == searched[1]
    vectors = [torch.tensor(one.embed(prompt, pooling="mean")[0].embedding) for one in (whole, llm)]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)


def test_ranks_keep_codes_with_the_scales_of_their_heads(make: Make) -> None:
    """A vector is rounded by itself, so whoever has its head writes the same codes."""
    whole, parts = make(1, kv_cache_dtype="int8"), make(2, kv_cache_dtype="int8")
    check_greedy(whole, PROMPTS, tokens_of(parts, PROMPTS))
    assert parts.info.kv_cache_bytes == whole.info.kv_cache_bytes


def test_tokens_do_not_depend_on_company(make: Make) -> None:
    """Bit for bit: the ranks' parts are added in one order, whatever the number of tokens."""
    llm = make(4, max_num_batched_tokens=48, prefix_cache=False)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    together = run(llm, PROMPTS, sampling)
    for prompt, completion in zip(PROMPTS[::2], together[::2], strict=True):
        (alone,) = run(llm, [prompt], sampling)
        assert (alone.token_ids, alone.logprobs) == (completion.token_ids, completion.logprobs)


def test_preempted_sequences_come_back_from_all_ranks_hosts(make: Make) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    expected = tokens_of(make(1), PROMPTS[1:5], sampling)
    llm = make(2, num_blocks=7, max_model_len=64, host_kv_bytes=1 << 20, preemption_mode="swap", prefix_cache=False)
    assert tokens_of(llm, PROMPTS[1:5], sampling) == expected
    assert llm.stats().preemption.num_swapped > 0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("checkpoint", SIZES)
def test_a_rank_reads_its_share_of_the_files(checkpoints: dict[str, Path], checkpoint: str, size: int) -> None:
    """Within 5 %, but for the KV heads that several ranks have."""
    source = open_source(checkpoints[checkpoint])
    config = source.config
    whole = sum(weight.nbytes for _, weight in source.weights())
    num_extra_heads = 2 * config.num_layers * max(0, size - config.num_kv_heads) / size
    extra = num_extra_heads * config.head_dim * (config.hidden_size + 1) * 4
    for rank in range(size):
        part = PartOfSource(source, ShardPlan(config, rank, size))
        load_model(part)
        assert part.num_bytes - extra == pytest.approx(whole / size, rel=0.05)


@pytest.mark.model
def test_a_rank_keeps_its_share_of_the_weights(demo_source: GGUFSource) -> None:
    whole = packed_bytes(load_model(demo_source))
    for rank in range(3):
        part = PartOfSource(demo_source, ShardPlan(demo_source.config, rank, 3))
        assert packed_bytes(load_model(part)) == pytest.approx(whole / 3, rel=0.05)


def packed_bytes(model: Any) -> int:
    """Return the bytes of a model's matrices in memory."""
    linears = [linear for layer in model.layers for linear in (layer.attention.qkv, layer.attention.out)]
    linears += [linear for layer in model.layers for linear in (layer.mlp.gate_up, layer.mlp.down)]
    matrices = [linear.parameters for linear in linears] + [model.embedding.parameters]
    if isinstance(matrices[0], PackedParameters):
        return sum(part.weight.num_bytes for matrix in matrices for part in matrix.parts)
    return sum(matrix.weight.nbytes for matrix in matrices)


def test_sizes_and_what_cannot_be_done_are_refused(make: Make) -> None:
    with pytest.raises(InvalidConfig, match=r"tensor_parallel_size 3 does not fit .*use 1 or 2 or 4"):
        make(3)
    llm = make(2)
    with pytest.raises(InvalidRequest, match="cannot put its model aside"):
        llm.sleep()


def test_the_model_is_described_as_a_whole(make: Make) -> None:
    whole, llm = make(1), make(2)
    assert llm.info.num_parameters == whole.info.num_parameters
    assert llm.info.kv_cache_bytes == whole.info.kv_cache_bytes
    assert isinstance(llm._engine._executor._runner.model, LeadingModel)
