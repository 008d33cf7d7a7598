"""Beam search of the whole engine on the real model, held against Transformers' `generate` in float32.

The hypotheses of equal rank must be the same tokens, or have scores within `TIE`: float32 sums in another order swap
beams that are as good as equal, and what follows from them. Such ties are counted and printed. Beside the model's own
end token, the full stop and the comma end a hypothesis, so that short and long ones compete.

A few prompts and settings, new ones in each run, are for every day; all of them are marked `slow`, and leave their
counts in the file that `OCTAVO_RESULTS` names, setting by setting:

    OCTAVO_RESULTS=benchmarks/results/beam_identity.json pytest tests/test_beam_identity.py -m slow -s
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from demo_oracle import demo_oracle

from octavo_engine import LLM, BeamSearchParams
from octavo_engine.weights.locate import locate_model

pytestmark = pytest.mark.model

TIE = 1e-3
NUM_OUTPUT_TOKENS = 12
NUM_PROMPTS = 30
END_OF_TEXT = 2

Tokens = tuple[int, ...]


class Setting(NamedTuple):
    """How to search."""

    width: int
    early_stopping: bool | str
    length_penalty: float


SETTINGS = [Setting(*s) for s in itertools.product((2, 4, 6), (True, False, "never"), (0.0, 1.0, 2.0))]


class Found(NamedTuple):
    """A hypothesis."""

    token_ids: Tokens
    score: float


class Counts(NamedTuple):
    """How hypotheses of equal rank compare; `ties` are the score differences of those with other tokens."""

    num_hypotheses: int
    num_equal: int
    ties: list[float]
    worst_difference: float


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(show_progress=False, num_blocks=1500, block_size=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def stop_ids(llm: LLM) -> list[int]:
    return [llm._text.encode_prompt(text)[0] for text in (".", ",")]


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[Tokens]:
    ids = llm._text.encode_prompt(
        "\n".join(inspect.getdoc(m) or inspect.getsource(m) for m in (textwrap, random, json))
    )
    rng = random.Random(30)
    lengths = [rng.choice([1, 3, 7, 8, 9, 16, 17, 24, 33, 47]) for _ in range(NUM_PROMPTS)]
    starts = [rng.randrange(len(ids) - length) for length in lengths]
    return [tuple(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def reference() -> Any:
    """Transformers' model in float32 on the dequantised weights of the demo file."""
    return demo_oracle()


def theirs(
    reference: Any, prompts: Sequence[Tokens], setting: Setting, stop_ids: list[int], **rules: Any
) -> list[list[Found]]:
    """Search with Transformers, prompts padded on the left."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), END_OF_TEXT), torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = [END_OF_TEXT, *stop_ids]
    with torch.inference_mode():
        output = reference.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NUM_OUTPUT_TOKENS,
            num_beams=setting.width,
            num_return_sequences=setting.width,
            early_stopping=setting.early_stopping,
            length_penalty=setting.length_penalty,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=END_OF_TEXT,
            return_dict_in_generate=True,
            output_scores=True,
            **rules,
        )
    found = []
    for tokens, score in zip(output.sequences[:, width:].tolist(), output.sequences_scores.tolist(), strict=True):
        length = next((place + 1 for place, token_id in enumerate(tokens) if token_id in ends), len(tokens))
        found.append(Found(tuple(tokens[:length]), score))
    return [found[i : i + setting.width] for i in range(0, len(found), setting.width)]


def ours(llm: LLM, prompts: Sequence[Tokens], setting: Setting, stop_ids: list[int], **rules: Any) -> list[list[Found]]:
    width, early_stopping, length_penalty = setting
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=NUM_OUTPUT_TOKENS,
        early_stopping=early_stopping,  # type: ignore[arg-type]
        length_penalty=length_penalty,
        stop_token_ids=stop_ids,
        **rules,
    )
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [[Found(tuple(choice.token_ids), choice.score or 0.0) for choice in output.outputs] for output in outputs]


def check(ours: list[list[Found]], theirs: list[list[Found]]) -> Counts:
    """Compare hypothesis by hypothesis."""
    pairs = [pair for own, other in zip(ours, theirs, strict=True) for pair in zip(own, other, strict=True)]
    for mine, their in pairs:
        assert mine.score == pytest.approx(their.score, abs=TIE)
    ties = [abs(mine.score - their.score) for mine, their in pairs if mine.token_ids != their.token_ids]
    worst = max(abs(mine.score - their.score) for mine, their in pairs)
    return Counts(len(pairs), len(pairs) - len(ties), ties, worst)


def record(setting: Setting, counts: Counts) -> None:
    """Put a setting's counts into the file of results, beside those of other settings."""
    if "OCTAVO_RESULTS" not in os.environ:
        return
    path = Path(os.environ["OCTAVO_RESULTS"])
    known = json.loads(path.read_text())["settings"] if path.exists() else {}
    known[str(setting)] = counts._asdict()
    every = [known[str(setting)] for setting in SETTINGS if str(setting) in known]
    results = {
        "num_prompts": NUM_PROMPTS,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "tie_below": TIE,
        "num_hypotheses": sum(own["num_hypotheses"] for own in every),
        "num_equal": sum(own["num_equal"] for own in every),
        "num_ties": sum(len(own["ties"]) for own in every),
        "worst_difference": max(own["worst_difference"] for own in every),
        "settings": {str(setting): known[str(setting)] for setting in SETTINGS if str(setting) in known},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def test_some_searches_equal_transformers(llm: LLM, reference: Any, prompts: list[Tokens], stop_ids: list[int]) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    num_ties, few = 0, rng.sample(prompts, 3)
    settings = [
        setting._replace(width=width) for setting, width in zip(rng.sample(SETTINGS, 3), (2, 4, 6), strict=True)
    ]
    for setting in settings:
        num_ties += len(check(ours(llm, few, setting, stop_ids), theirs(reference, few, setting, stop_ids)).ties)
    print(f"\nseed {seed}: {num_ties} ties among {3 * (2 + 4 + 6)} hypotheses")
    assert num_ties <= 4
    assert llm.stats().cache.num_used == 0


@pytest.mark.slow
def test_searches_under_rules_equal_transformers(llm: LLM, reference: Any, prompts: list[Tokens]) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    path = Path(locate_model(None))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    few = [prompt for prompt in prompts if len(prompt) >= 16][:3]
    banned = [llm._text.encode_prompt(text) for text in (" the", " a", "\n")]
    setting, own_rules = Setting(4, False, 1.0), {"repetition_penalty": 1.2, "bad_words_ids": banned}
    free = ours(llm, few, setting, [], **own_rules)
    stops = [llm.decode(beams[0].token_ids)[5:8] for beams in free]  # what comes, and spans tokens
    own = ours(llm, few, setting, [], stop=stops, include_stop_str_in_output=True, **own_rules)
    rules = own_rules | {"stop_strings": stops, "tokenizer": tokenizer}
    # One by one: what fills up a shorter prompt would count as repeated.
    other = [theirs(reference, [prompt], setting, [], **rules)[0] for prompt in few]
    # Transformers fills up what a stop string ends.
    cut = [[found._replace(token_ids=upto_stop(llm, found.token_ids, stops)) for found in beams] for beams in other]
    counts = check(own, cut)
    assert len(counts.ties) <= 1
    assert any(len(found.token_ids) < NUM_OUTPUT_TOKENS for beams in own for found in beams)


def upto_stop(llm: LLM, token_ids: Tokens, stops: Sequence[str]) -> Tokens:
    texts = (llm.decode(token_ids[:count]) for count in range(len(token_ids) + 1))
    return next((token_ids[:count] for count, text in enumerate(texts) if any(s in text for s in stops)), token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_all_searches_equal_transformers(
    llm: LLM, reference: Any, prompts: list[Tokens], stop_ids: list[int], setting: Setting
) -> None:
    own = ours(llm, prompts, setting, stop_ids)
    other: list[list[Found]] = []
    for start in range(0, NUM_PROMPTS, 10):
        other += theirs(reference, prompts[start : start + 10], setting, stop_ids)
    counts = check(own, other)
    print(f"\n{setting}: {counts}")
    record(setting, counts)
    assert len(counts.ties) <= 0.02 * counts.num_hypotheses
