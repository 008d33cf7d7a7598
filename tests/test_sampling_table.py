"""docs/sampling.md holds every field of SamplingParams with its default, and a test states the meaning of each."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from octavo_engine import SamplingParams

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \| (.*) ?\|$", TABLE, flags=re.MULTILINE)
IN_WORDS = {"dry_sequence_breakers"}

DRAWS = "test_draws.py::test_draws_follow_what_the_parameters_mean"  # NumPy in float64, chi-square
DRY = "test_rules.py::test_dry_equals_a_plain_search_for_repetitions"
COUNTS = "test_sampler.py::test_presence_and_frequency_count_the_output_alone"
STATEMENTS = {
    "n": "test_scheduler.py::test_samples_hold_the_prompts_full_blocks_once_and_what_diverged",
    "best_of": "test_llm.py::test_the_best_of_several_samples_are_those_of_the_largest_logprob",
    "temperature": DRAWS,
    "top_p": DRAWS,
    "top_k": DRAWS,
    "min_p": DRAWS,
    "typical_p": DRAWS,
    "xtc_probability": DRAWS,
    "xtc_threshold": DRAWS,
    "mirostat_mode": DRAWS,
    "mirostat_tau": DRAWS,
    "mirostat_eta": "test_rules.py::test_mirostat_learns_from_each_draw",
    "presence_penalty": COUNTS,
    "frequency_penalty": COUNTS,
    "repetition_penalty": "test_sampler.py::test_repetition_penalty_equals_transformers_on_prompt_and_output",
    "dry_multiplier": DRY,
    "dry_base": DRY,
    "dry_allowed_length": DRY,
    "dry_sequence_breakers": "test_sampling_tokens.py::test_every_token_with_a_breaker_in_it_breaks",
    "dry_breaker_ids": DRY,
    "logit_bias": "test_rules.py::test_logit_bias_equals_transformers",
    "allowed_token_ids": "test_rules.py::test_only_allowed_tokens_are_left",
    "bad_words": "test_sampling_tokens.py::test_a_bad_word_is_banned_at_the_start_and_within_a_sentence",
    "bad_words_ids": "test_rules.py::test_bad_words_equal_transformers_in_random_contexts",
    "logits_processors": "test_rules.py::test_processors_see_the_tokens_so_far_and_change_their_row_alone",
    "structured_outputs": "test_structured_outputs.py::test_samples_of_one_prompt_follow_their_own_grammars",
    "seed": "test_rules.py::test_every_kind_goes_on_after_preemption",
    "max_tokens": "test_scheduler.py::test_one_request_gives_the_models_tokens_and_ends_by_length",
    "min_tokens": "test_sampler.py::test_min_tokens_bans_stop_tokens_until_they_are_reached",
    "stop": "test_stop.py::test_text_is_cut_before_the_first_complete_stop",
    "stop_token_ids": "test_scheduler.py::test_stop_tokens_end_a_sequence_and_late_tokens_are_dropped",
    "include_stop_str_in_output": "test_stop.py::test_stop_string_is_shown_on_request",
    "ignore_eos": "test_scheduler.py::test_stop_tokens_end_a_sequence_and_late_tokens_are_dropped",
    "logprobs": "test_sampler.py::test_logprobs_are_of_the_raw_distribution",
    "logprobs_mode": "test_logprobs.py::test_processed_equals_transformers_chain",
    "logprob_token_ids": "test_logprobs.py::test_given_tokens_are_reported_besides",
    "prompt_logprobs": "test_logprobs.py::test_prompt_logprobs_do_not_depend_on_chunks",
    "skip_special_tokens": "test_output.py::test_special_tokens_are_text_only_on_request",
    "truncate_prompt_tokens": "test_llm.py::test_a_long_prompt_is_truncated_at_its_beginning",
    "output_kind": "test_async_engine.py::test_the_output_kind_says_what_is_yielded",
}
"""For each field, the test of the engine that states its meaning by other means than the engine's."""


def test_the_table_has_every_field_once_and_no_other() -> None:
    assert sorted(name for name, *_ in ROWS) == sorted(field.name for field in fields(SamplingParams))


def test_the_table_has_the_defaults() -> None:
    defaults = {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(SamplingParams)
    }
    told = {name: default for name, _, default, _ in ROWS if name not in IN_WORDS}
    expected = {name: repr(value).replace("'", '"') for name, value in defaults.items() if name not in IN_WORDS}
    assert {name: default.strip("`") for name, default in told.items()} == expected


def test_every_field_has_a_test_of_its_meaning() -> None:
    assert sorted(STATEMENTS) == sorted(field.name for field in fields(SamplingParams))


@pytest.mark.parametrize("statement", sorted(set(STATEMENTS.values())))
def test_the_tests_of_meanings_exist(statement: str) -> None:
    file, _, name = statement.partition("::")
    assert f"\ndef {name}(" in (ROOT / "packages/engine/tests" / file).read_text(encoding="utf-8")
