"""Structured output through the engine, on a small model with random weights: texts fit, whatever else runs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="LLM needs the extra [local]")
pytest.importorskip("llguidance", reason="structured output needs the extra [structured]")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is the oracle")

from octavo_engine import (
    LLM,
    BeamSearchParams,
    FinishReason,
    InvalidRequest,
    RequestFailed,
    RequestOutput,
    SamplingParams,
)
from octavo_engine import StructuredOutputsParams as Params
from octavo_engine.prompts import EncodedPrompt
from octavo_engine.runner.rules import grammar
from octavo_engine.runner.rules.grammar import GrammarRule
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.structured.compiler import GrammarCompiler

EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "bc"]},
        "list": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "list"],
    "additionalProperties": False,
}
PROMPT = "hello world"
MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def make_llm(tiny_model_path: Path) -> Iterator[MakeLLM]:
    opened: list[LLM] = []

    def make(**options: Any) -> LLM:
        opened.append(LLM(str(tiny_model_path), show_progress=False, **{"num_blocks": 400, "block_size": 8, **options}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


@pytest.fixture(scope="module")
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm()


def sampling(seed: int = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 100, **fields})


def flat(_: list[int], logits: Any) -> Any:
    """Make all tokens equally likely, since the model's random weights always prefer the same ones."""
    return logits * 0


def chosen(output: RequestOutput) -> list[tuple[list[int], FinishReason]]:
    return [(choice.token_ids, choice.finish_reason) for choice in output.outputs]


MIXED = [
    sampling(1, structured_outputs=Params(json=SCHEMA)),
    sampling(2),
    sampling(3, structured_outputs=Params(regex=r"[A-Z]{3}-[0-9]{2,4}")),
    sampling(4, structured_outputs=Params(choice=["yes", "no", "perhaps not"]), n=3),
    sampling(5, structured_outputs=Params(json=SCHEMA), repetition_penalty=1.3, presence_penalty=0.5),
    sampling(6, structured_outputs=Params(grammar='start: "<" /[a-z]+/ ">"'), logprobs=2),
    SamplingParams(temperature=0, max_tokens=30),
    sampling(7, structured_outputs=Params(json_object=True), max_tokens=20),
    sampling(9, structured_outputs=Params(json=SCHEMA), logits_processors=[flat]),
    sampling(8, structured_outputs=Params(json=SCHEMA), temperature=0.0),
]


def test_texts_fit_their_constraints(llm: LLM) -> None:
    own = sampling(structured_outputs=Params(json=SCHEMA), n=40, logits_processors=[flat])
    for output in llm.generate(PROMPT, own)[0].outputs:
        assert output.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(output.text), SCHEMA)
        assert output.token_ids[-1] == EOS
        assert ": " not in re.sub(r'"(\\.|[^"\\])*"', "", output.text)


@pytest.mark.parametrize("pattern", [r"[A-Z]{3}-[0-9]{2,4}", r"(ab|c)*d", r"\"[^\"\\]{0,9}\""])
def test_a_regex_is_matched_as_a_whole(llm: LLM, pattern: str) -> None:
    own = [sampling(seed, structured_outputs=Params(regex=pattern), logits_processors=[flat]) for seed in range(20)]
    for output in llm.generate([PROMPT] * 20, own):
        assert output.outputs[0].finish_reason is FinishReason.STOP
        assert re.fullmatch(pattern, output.outputs[0].text)


def test_every_choice_is_drawn_and_nothing_else(llm: LLM) -> None:
    choice = ["yes", "no", "yesterday", "none of it"]
    output = llm.generate(PROMPT, sampling(structured_outputs=Params(choice=choice), n=60, logits_processors=[flat]))[0]
    assert {c.text for c in output.outputs} == set(choice)


def test_a_mixed_batch_equals_each_alone(llm: LLM) -> None:
    together = llm.generate([PROMPT] * len(MIXED), MIXED)
    for own, output in zip(MIXED, together, strict=True):
        assert chosen(llm.generate(PROMPT, own)[0]) == chosen(output)


def test_jumping_ahead_changes_no_token(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    expected = llm.generate([PROMPT] * len(MIXED), MIXED)
    before = llm.stats().num_steps
    llm.generate(PROMPT, MIXED[0])
    num_steps = llm.stats().num_steps - before
    assert num_steps < len(expected[0].outputs[0].token_ids)
    step_by_step = make_llm()
    monkeypatch.setattr(step_by_step._engine._executor._runner, "_jumps_ahead", False)
    assert [chosen(o) for o in step_by_step.generate([PROMPT] * len(MIXED), MIXED)] == [chosen(o) for o in expected]


@pytest.mark.parametrize("jumps", [True, False], ids=["jumps", "steps"])
def test_a_token_that_is_tried_is_the_one_drawn_under_a_mask(
    monkeypatch: pytest.MonkeyPatch, llm: LLM, jumps: bool
) -> None:
    monkeypatch.setattr(llm._engine._executor._runner, "_jumps_ahead", jumps)
    many = [replace(own, seed=seed, top_p=top_p) for seed in range(3) for own in MIXED for top_p in (1.0, 0.9)]
    found: list[bool] = []
    allows = GrammarRule.allows

    def watched(rule: GrammarRule, row: int, token_id: int) -> bool:
        found.append(allows(rule, row, token_id))
        return found[-1]

    monkeypatch.setattr(GrammarRule, "allows", watched)
    tried = llm.generate([PROMPT] * len(many), many)
    assert {*found} == {True, False}
    monkeypatch.setattr(SamplingRows, "forced", lambda self, rows: {})
    monkeypatch.setattr(grammar, "_may_draw_first", lambda sampling: False)
    found.clear()
    assert [chosen(o) for o in llm.generate([PROMPT] * len(many), many)] == [chosen(o) for o in tried]
    assert not found


@pytest.mark.parametrize(
    "params",
    [Params(json=SCHEMA), Params(regex="(foo|bar)+[0-9]{2,4}@x"), Params(grammar='start: "a"* "b" "c"?')],
    ids=["json", "regex", "lark"],
)
def test_a_token_is_forced_or_allowed_as_its_mask_says(llm: LLM, params: Params) -> None:
    grammars = GrammarCompiler(llm._text.tokenizer, vocab_size=llm.info.vocab_size, eos_token_ids=[EOS])
    source = random.Random(4)
    for _ in range(5):
        rule = GrammarRule(1, grammars.vocab_size, grammars)
        rule._matchers[0] = matcher = grammars.matcher(params)
        while not matcher.is_stopped():
            words = rule.masks(np.array([0]), np.array([0])).bitmask.numpy().view(np.uint8)
            bits = np.unpackbits(words, bitorder="little")[: grammars.vocab_size]
            allowed = np.flatnonzero(bits).tolist()
            if rule.forced(0):
                assert allowed == rule.forced(0)[:1]
            else:
                assert [i for i in range(grammars.vocab_size) if rule.allows(0, i)] == allowed
            rule.append(np.array([0]), np.array([source.choice(allowed)]))


def test_preemption_changes_no_token(make_llm: MakeLLM, llm: LLM) -> None:
    many = [replace(own, seed=seed) for seed in range(3) for own in MIXED]
    expected = llm.generate([PROMPT] * len(many), many)
    small = make_llm(num_blocks=20, prefix_cache=False)
    outputs = small.generate([PROMPT] * len(many), many)
    assert small.stats().num_preemptions > 0
    assert [chosen(o) for o in outputs] == [chosen(o) for o in expected]


def test_chunks_change_no_token(make_llm: MakeLLM, llm: LLM) -> None:
    chunked = make_llm(max_num_batched_tokens=16)
    expected = llm.generate([PROMPT] * len(MIXED), MIXED)
    assert [chosen(o) for o in chunked.generate([PROMPT] * len(MIXED), MIXED)] == [chosen(o) for o in expected]


def test_samples_of_one_prompt_follow_their_own_grammars(llm: LLM) -> None:
    own = sampling(structured_outputs=Params(json=SCHEMA), n=5, logits_processors=[flat])
    output = llm.generate(PROMPT, own)[0]
    for choice in output.outputs:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
    assert len({choice.text for choice in output.outputs}) == 5


def test_a_text_that_is_cut_says_so(llm: LLM) -> None:
    whole = llm.generate(PROMPT, sampling(1, structured_outputs=Params(json=SCHEMA)))[0].outputs[0]
    for max_tokens in range(1, len(whole.token_ids)):
        own = sampling(1, structured_outputs=Params(json=SCHEMA), max_tokens=max_tokens)
        cut = llm.generate(PROMPT, own)[0].outputs[0]
        assert cut.finish_reason is FinishReason.LENGTH
        assert cut.token_ids == whole.token_ids[:max_tokens]


def test_a_stop_string_ends_a_text_within_its_grammar(llm: LLM) -> None:
    own = sampling(1, structured_outputs=Params(json=SCHEMA), stop=['"kind":'], include_stop_str_in_output=True)
    output = llm.generate(PROMPT, own)[0].outputs[0]
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason == '"kind":'
    assert re.fullmatch(r'\{"name":".*","kind":', output.text)


def test_logprobs_are_of_the_free_distribution(llm: LLM) -> None:
    own = sampling(structured_outputs=Params(choice=["zebra"]), logprobs=3)
    output = llm.generate(PROMPT, own)[0].outputs[0]
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert any(entry.rank > 1 for entry in output.logprobs)
    assert all(entry.logprob < 0 for entry in output.logprobs)


def test_a_processor_cannot_leave_the_grammar(llm: LLM) -> None:
    own = sampling(structured_outputs=Params(regex="[ab]{9}"), logits_processors=[flat])
    assert re.fullmatch("[ab]{9}", llm.generate(PROMPT, own)[0].outputs[0].text)


@pytest.mark.parametrize("regex", ["[ab]{9}", "zebra"], ids=["drawn", "forced"])
def test_a_request_that_can_draw_nothing_ends_alone(llm: LLM, regex: str) -> None:
    barred = sampling(structured_outputs=Params(regex=regex), allowed_token_ids=[3, EOS])
    with pytest.raises(RequestFailed):
        llm.generate(PROMPT, barred)
    assert llm.generate(PROMPT, MIXED[0])[0].outputs[0].finish_reason is FinishReason.STOP


def test_an_error_at_a_later_mask_ends_its_request_alone(make_llm: MakeLLM) -> None:
    llm = make_llm()
    # Passes at the start; its automaton outgrows llguidance's limits within a few tokens.
    exploding = sampling(structured_outputs=Params(regex="(a?){5000}a{5000}"))
    beside = llm._runs.requests([EncodedPrompt(None, [3, 4, 5])] * 2, [exploding, MIXED[0]])
    for running in beside:
        llm._engine.add(running.request)
    ends = {}
    while llm._engine.has_work:
        ends |= {u.request_id: u for u in llm._engine.step() if u.finish_reason is not None}
    bad, good = (ends[running.request.request_id] for running in beside)
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.error is not None
    assert "grammar" in bad.error
    assert good.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 3}], ids=str)
def test_what_would_keep_a_text_from_ending_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="contradicts structured_outputs") as caught:
        sampling(structured_outputs=Params(regex="a"), **fields)
    assert caught.value.param in fields


def test_something_else_than_params_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be StructuredOutputsParams, got dict"):
        sampling(structured_outputs={"regex": "a"})


def test_a_bad_schema_is_refused_at_submission_and_nothing_starts(llm: LLM) -> None:
    bad = sampling(structured_outputs=Params(json={"properties": {"a": {"contains": {}}}}))
    with pytest.raises(InvalidRequest, match="/properties/a/contains"):
        llm.generate([PROMPT, PROMPT], [MIXED[0], bad])
    assert not llm._engine.has_work


def test_beams_keep_to_their_grammar_and_find_the_likeliest_texts(llm: LLM) -> None:
    choice = ["yes", "no", "yesterday", "none of it", "perhaps"]
    params = BeamSearchParams(beam_width=5, length_penalty=0.0, structured_outputs=Params(choice=choice), logprobs=1)
    found = llm.beam_search([PROMPT], params)[0].outputs
    assert {output.text for output in found} == set(choice)
    # Every choice, scored by itself: a search that is as wide as there are choices misses none.
    for output in found:
        alone = BeamSearchParams(beam_width=1, length_penalty=0.0, structured_outputs=Params(choice=[output.text]))
        assert llm.beam_search([PROMPT], alone)[0].outputs[0].score == pytest.approx(output.score, abs=1e-4)
    assert [output.score for output in found] == sorted((output.score for output in found), reverse=True)


def test_beams_with_a_schema_fit_it_beside_others_and_after_preemption(make_llm: MakeLLM, llm: LLM) -> None:
    held = BeamSearchParams(beam_width=3, max_tokens=100, structured_outputs=Params(json=SCHEMA))
    free = BeamSearchParams(beam_width=2, max_tokens=20)
    prompts, asked = [PROMPT, PROMPT, "12 3", "the"] * 3, [held, free, held, replace(held, beam_width=2)] * 3
    outputs = llm.beam_search(prompts, asked)
    for params, output in zip(asked, outputs, strict=True):
        for choice in output.outputs:
            if params.structured_outputs is not None and choice.finish_reason is FinishReason.STOP:
                jsonschema.validate(json.loads(choice.text), SCHEMA)
    assert any(choice.finish_reason is FinishReason.STOP for choice in outputs[0].outputs)
    alone = llm.beam_search([PROMPT], held)[0]
    assert [(c.token_ids, c.score) for c in alone.outputs] == [(c.token_ids, c.score) for c in outputs[0].outputs]
    small = make_llm(num_blocks=41, prefix_cache=False)
    pressed = small.beam_search(prompts, asked)
    assert small.stats().num_preemptions > 0
    assert [[c.token_ids for c in o.outputs] for o in pressed] == [[c.token_ids for c in o.outputs] for o in outputs]


def test_a_search_finds_no_more_texts_than_there_are(llm: LLM) -> None:
    few = BeamSearchParams(beam_width=4, structured_outputs=Params(choice=["yes", "no", "yes"]), logprobs=1)
    some, many = llm.beam_search([PROMPT, PROMPT], [few, replace(few, structured_outputs=None, max_tokens=3)])
    assert {choice.text for choice in some.outputs} == {"yes", "no"}
    assert [choice.finish_reason for choice in some.outputs] == [FinishReason.STOP] * 2
    assert [choice.index for choice in some.outputs] == [0, 1]
    assert len(many.outputs) == 4
    none = replace(few, structured_outputs=Params(regex="[ab]{9}"), allowed_token_ids=[3])
    with pytest.raises(RequestFailed, match="leave no text"):
        llm.beam_search([PROMPT], none)
