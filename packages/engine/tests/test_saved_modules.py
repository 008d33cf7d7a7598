"""Adapters with an embedding or a head of their own (PEFT's modules_to_save), against Transformers with PEFT."""

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
peft = pytest.importorskip("peft", reason="PEFT is the oracle")

from octavo_engine import LLM, BeamSearchParams, InvalidAdapter, RequestOutput, SamplingParams

VOCAB_SIZE = 131
NUM_TOKENS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
REPORTED = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2, prompt_logprobs=0)
TIE = 1e-3

KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied by the head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "plain": {},
}

Checkpoint = tuple[Path, Any]
Models = dict[str | None, Any]

on_a_cpu = pytest.mark.skipif(os.environ.get("OCTAVO_BACKEND", "cpu") != "cpu", reason="only `cpu` promises bits")
only_untied = pytest.mark.parametrize("base", [False], indirect=True, ids=["untied"])
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="too slow in the interpreter")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(
    request: pytest.FixtureRequest, tiny_llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The tiny Llama, and one whose head is its embedding."""
    folder, model = tiny_llama
    if not request.param:
        return folder, model
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    tied = type(model)(config).eval()
    tied.load_state_dict(model.state_dict() | {"lm_head.weight": model.model.embed_tokens.weight})
    tied.tie_weights()
    tied_folder: Path = tmp_path_factory.mktemp("tied")
    tied.save_pretrained(tied_folder)
    shutil.copy(folder / "tokenizer.json", tied_folder)
    return tied_folder, tied


@pytest.fixture(scope="module")
def adapted(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    """A folder with an adapter of every kind, as PEFT saves it, and the models that PEFT makes of these files."""
    folder, (_, model) = tmp_path_factory.mktemp("adapters"), base
    return folder, {None: model, **{name: make(model, folder / name, seed) for seed, name in enumerate(KINDS)}}


def make(model: Any, folder: Path, seed: int, **settings: Any) -> Any:
    """Have PEFT save an adapter with random weights, of the kind that its folder is called; return what it reads."""
    torch.manual_seed(seed)
    config = {"target_modules": ["q_proj", "down_proj"], "r": 4, **KINDS.get(folder.name, {}), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config, init_lora_weights=False))
        for name, parameter in written.named_parameters():
            if "modules_to_save" in name:
                parameter.data.normal_(0, 0.2)
        written.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@contextmanager
def engine(base: Checkpoint, folder: Path, names: Any = KINDS, **options: Any) -> Iterator[LLM]:
    defaults = {"num_blocks": 400, "max_num_seqs": 16, "max_num_batched_tokens": 64, "enable_lora": True}
    with LLM(str(base[0]), show_progress=False, **{**defaults, **options}) as llm:
        for name in names:
            llm.load_adapter(name, str(folder / name))
        yield llm


def prompts(num: int) -> list[dict[str, list[int]]]:
    source = random.Random(3)
    return [
        {"prompt_token_ids": [source.randrange(VOCAB_SIZE) for _ in range(source.randint(3, 20))]} for _ in range(num)
    ]


def logprobs_of(model: Any, token_ids: list[int]) -> Any:
    """Return the log-probabilities that a model gives each token after the first, [tokens - 1, vocab_size]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)


def check(model: Any, output: RequestOutput) -> None:
    """Check that each token of a greedy answer is the model's likeliest, or ties with it."""
    answer = output.outputs[0].token_ids
    assert len(answer) == NUM_TOKENS
    expected = logprobs_of(model, output.prompt_token_ids + answer)[-NUM_TOKENS:]
    assert (expected.amax(-1) - expected.gather(-1, torch.tensor(answer)[:, None])[:, 0]).max() <= TIE


def check_reported(model: Any, prompt: list[int], choice: Any) -> None:
    """Check the log-probabilities that were reported of a choice's tokens."""
    expected = logprobs_of(model, prompt + choice.token_ids)[len(prompt) - 1 :]
    reported = [entry.logprob for entry in choice.logprobs]
    chosen = expected.gather(-1, torch.tensor(choice.token_ids)[:, None])[:, 0]
    assert reported == pytest.approx(chosen.tolist(), abs=TIE)


def test_saved_matrices_in_one_batch_with_others_equal_what_peft_computes(
    base: Checkpoint, adapted: tuple[Path, Models]
) -> None:
    folder, models = adapted
    names = [*KINDS, None, "both"]
    with engine(base, folder) as llm:
        assert llm.adapters()[0].num_bytes - llm.adapters()[-1].num_bytes == 4 * VOCAB_SIZE * 64
        outputs = llm.generate(prompts(len(names)), GREEDY, adapter=names)
        reported = llm.generate(prompts(len(names))[::-1], REPORTED, adapter=names)
    for name, output in zip(names, outputs, strict=True):
        check(models[name], output)
    for name, output in zip(names, reported, strict=True):
        check(models[name], output)
        check_reported(models[name], output.prompt_token_ids, output.outputs[0])
        expected = logprobs_of(models[name], output.prompt_token_ids)
        following = torch.tensor(output.prompt_token_ids[1:])
        found = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
        assert found == pytest.approx(expected.gather(-1, following[:, None])[:, 0].tolist(), abs=TIE)


@only_untied
def test_forks_and_beams_go_by_the_head_of_their_adapter(base: Checkpoint, adapted: tuple[Path, Models]) -> None:
    folder, models = adapted
    names = [None, "head", "both", "plain", "embedding"]
    forking = SamplingParams(n=2, seed=5, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    beams = BeamSearchParams(beam_width=3, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    with engine(base, folder) as llm:
        forked = llm.generate(prompts(5), forking, adapter=names)
        searched = llm.beam_search(prompts(5), beams, adapter=names)
    for name, output in zip(names * 2, forked + searched, strict=True):
        assert len(output.outputs) == (2 if output in forked else 3)
        for choice in output.outputs:
            check_reported(models[name], output.prompt_token_ids, choice)


@on_a_cpu
@only_untied
def test_rows_have_the_same_bits_whatever_is_beside_them(base: Checkpoint, adapted: tuple[Path, Models]) -> None:
    folder, _ = adapted
    names = ["both", None, "plain", "head", "both", "both", "embedding", "both"]
    with engine(base, folder) as llm:
        mixed = llm.generate(prompts(8), REPORTED, adapter=names)
    with engine(base, folder, max_num_seqs=1, prefix_cache=False) as llm:
        alone = llm.generate(prompts(8), REPORTED, adapter=names)
    assert [output.outputs for output in mixed] == [output.outputs for output in alone]
    assert [output.prompt_logprobs for output in mixed] == [output.prompt_logprobs for output in alone]


@only_untied
def test_slots_change_hands_and_contents_are_replaced(
    base: Checkpoint, adapted: tuple[Path, Models], tmp_path: Path
) -> None:
    folder, models = adapted
    names = ["both", "plain", "head", None, "embedding", "plain", "both"]
    with engine(base, folder, max_loras=1, max_cpu_loras=2) as llm:
        for name, output in zip(names, llm.generate(prompts(7), GREEDY, adapter=names), strict=True):
            check(models[name], output)
        other = make(base[1], tmp_path / "both", seed=9)
        llm.load_adapter("both", str(tmp_path / "both"), in_place=True)
        (output,) = llm.generate(prompts(1), GREEDY, adapter="both")
        check(other, output)
        llm.unload_adapter("both")
        for name in ("plain", None):
            (output,) = llm.generate(prompts(1), GREEDY, adapter=name)
            check(models[name], output)


@only_untied
def test_pooled_prompts_begin_with_the_adapter_s_embedding(base: Checkpoint, adapted: tuple[Path, Models]) -> None:
    folder, models = adapted
    names = ["both", None, "head", "embedding"]
    with engine(base, folder) as llm:
        outputs = llm.embed(prompts(4), adapter=names)
    for name, prompt, output in zip(names, prompts(4), outputs, strict=True):
        with torch.inference_mode():
            expected = models[name](torch.tensor([prompt["prompt_token_ids"]]), output_hidden_states=True)
        last = expected.hidden_states[-1][0, -1]
        assert output.embedding == pytest.approx((last / last.norm()).tolist(), abs=TIE)


def resized(model: Any, folder: Path) -> None:
    model = copy.deepcopy(model)
    model.resize_token_embeddings(VOCAB_SIZE + 5)
    make(model, folder, 0, modules_to_save=["lm_head"])


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "another module": (
        lambda model, folder: make(model, folder, 0, modules_to_save=["norm", "lm_head"]),
        r"modules_to_save: expected embed_tokens and lm_head alone.*found .*'norm'",
    ),
    "a resized vocabulary": (resized, r"(head|embedding): expected shape \[131, 64\].*found \[136, 64\]; .* merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name(tiny_llama: Checkpoint, tmp_path: Path, case: str) -> None:
    write, message = REFUSED[case]
    write(tiny_llama[1], tmp_path / "a")
    with engine(tiny_llama, tmp_path, ()) as llm, pytest.raises(InvalidAdapter, match=message):
        llm.load_adapter("a", str(tmp_path / "a"))
