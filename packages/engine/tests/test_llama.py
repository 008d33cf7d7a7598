"""Llama and Mixtral on the paged runner against Transformers, on tiny random checkpoints in float32."""

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.models.llama import Llama
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.testing import Driver, make_runner
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 131
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default_rope_gqa_4_2_untied": {},
    "llama3_rope_gqa_3_1_tied": {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "attention_and_mlp_bias": {"attention_bias": True, "mlp_bias": True},
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:  # it takes its time, and runs mixtures in tests of their own
    VARIANTS["mixtral_2_of_4_experts"] = {
        "architecture": "Mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }


class RecordingLlama:
    """A model, and the logits of every token of every step that a runner computes with it."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.steps: list[tuple[list[int], list[int], Tensor]] = []

    def watch(self, model_input: ModelInput, hidden: Tensor) -> None:
        starts = model_input.query_start_loc.tolist()
        self.steps.append((starts, model_input.positions.tolist(), self.model.logits(hidden).cpu()))

    def runner(self) -> ModelRunner:
        return make_runner(self.model, watch=self.watch)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a tiny checkpoint, and Transformers' model of it."""
    torch.manual_seed(7)
    variant = dict(VARIANTS[request.param])
    architecture = variant.pop("architecture", "Llama")
    config = getattr(transformers, f"{architecture}Config")(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            **variant,
        }
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases too, which Transformers sets to zero
        parameter.data.normal_(1.0 if parameter.dim() == 1 and len(parameter) == config.hidden_size else 0.0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def recorder(checkpoint: tuple[Path, Any], request: pytest.FixtureRequest, device: str) -> RecordingLlama:
    is_mixture = checkpoint[1].config.model_type == "mixtral"
    if INTERPRETED and is_mixture and "mixed_prefill" not in request.node.name:
        pytest.skip("an interpreter's time is spent on one test of a mixture, whose experts are many products")
    model = load_model(FolderSource(checkpoint[0]), device=device)
    assert isinstance(model, Llama)
    return RecordingLlama(model)


def prompts(*lengths: int) -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def expected_logits(checkpoint: tuple[Path, Any], token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits = checkpoint[1](torch.tensor([token_ids])).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def recorded_logits(recorder: RecordingLlama, places: list[dict[int, int]], row: int) -> Tensor:
    """Put a row's logits of all steps together; `places` maps row to sequence index, step by step."""
    parts = []
    for (starts, _, logits), place in zip(recorder.steps, places, strict=True):
        if row in place:
            parts.append(logits[starts[place[row]] : starts[place[row] + 1]])
    return torch.cat(parts)


def drive(recorder: RecordingLlama, inputs: list[list[int]], schedule: list[dict[int, int]]) -> Driver:
    driver = Driver(recorder.runner(), seed=11)
    for row, token_ids in enumerate(inputs):
        driver.add(row, token_ids)
    for step in schedule:
        driver.step(step)
    return driver


def check_against_transformers(
    checkpoint: tuple[Path, Any], recorder: RecordingLlama, inputs: list[list[int]], schedule: list[dict[int, int]]
) -> None:
    driver = drive(recorder, inputs, schedule)
    entered: set[int] = set()
    places = []
    for step in schedule:  # rows that enter come first
        order = [row for row in step if row not in entered] + [row for row in step if row in entered]
        entered |= set(step)
        places.append({row: place for place, row in enumerate(order)})
    for row, state in driver.rows.items():
        computed = state.token_ids[: state.num_computed_tokens]
        ours = recorded_logits(recorder, places, row)
        theirs = expected_logits(checkpoint, computed)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
        drawn = theirs[len(inputs[row]) - 1 :].argmax(-1).tolist()
        assert state.token_ids[len(inputs[row]) :] == drawn


@pytest.mark.parametrize("length", [1, 3, 4, 5, 37])
def test_whole_prefill_equals_transformers(checkpoint: tuple[Path, Any], recorder: RecordingLlama, length: int) -> None:
    check_against_transformers(checkpoint, recorder, prompts(length), [{0: length}])


@pytest.mark.parametrize("chunks", [[1, 1, 5], [4, 3], [3, 4, 16, 2]], ids=str)
def test_chunked_prefill_equals_transformers(
    checkpoint: tuple[Path, Any], recorder: RecordingLlama, chunks: list[int]
) -> None:
    check_against_transformers(checkpoint, recorder, prompts(sum(chunks)), [{0: chunk} for chunk in chunks])


def test_decode_step_by_step_equals_transformers(checkpoint: tuple[Path, Any], recorder: RecordingLlama) -> None:
    num_steps = 4 if INTERPRETED else 12  # where one takes a third of a second
    check_against_transformers(checkpoint, recorder, prompts(6), [{0: 6}, *[{0: 1}] * num_steps])


def test_mixed_prefill_chunks_and_decodes_equal_transformers(
    checkpoint: tuple[Path, Any], recorder: RecordingLlama
) -> None:
    schedule = [{0: 5}, {0: 1, 1: 7}, {1: 2, 2: 4, 0: 1}, {0: 1, 2: 16, 1: 1}, {1: 1, 2: 1}, {2: 1, 0: 1, 1: 1}]
    check_against_transformers(checkpoint, recorder, prompts(5, 9, 20), schedule)


def test_block_ids_do_not_matter(recorder: RecordingLlama) -> None:
    answers = []
    for seed in range(2 if INTERPRETED else 3):
        driver = Driver(recorder.runner(), seed=seed)
        for row, token_ids in enumerate(prompts(5, 9)):
            driver.add(row, token_ids)
        answers.append(driver.generate(3 if INTERPRETED else 6))
    assert all(a == b for a, b in itertools.pairwise(answers))


def test_token_ids_do_not_depend_on_chunking(recorder: RecordingLlama) -> None:
    (prompt,) = prompts(23)
    answers = []
    num_tokens = 3 if INTERPRETED else 6
    for chunk in (8, 23) if INTERPRETED else (1, 5, 23):
        driver = Driver(recorder.runner())
        driver.add(0, prompt)
        sizes = [min(chunk, 23 - start) for start in range(0, 23, chunk)]
        for size in sizes:
            driver.step({0: size})
        for _ in range(num_tokens - 1):
            driver.step({0: 1})
        answers.append(driver.rows[0].token_ids)
    assert all(a == b for a, b in itertools.pairwise(answers))
    assert len(answers[0]) == 23 + num_tokens
