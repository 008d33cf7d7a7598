"""SamplingParams: ranges, contradictions, and the forms that values are kept in."""

import math

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 2.1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.01),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("seed", 1 << 63),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -2),
        ("logprobs_mode", "cooked"),
        ("logprob_token_ids", [-1]),
        ("prompt_logprobs", -2),
        ("best_of", 0),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("output_kind", "all"),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("xtc_probability", 1.5),
        ("xtc_threshold", 0),
        ("mirostat_mode", 3),
        ("mirostat_tau", -1.0),
        ("mirostat_eta", 0),
        ("dry_multiplier", -0.1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_sequence_breakers", "abc"),
        ("dry_sequence_breakers", [""]),
        ("dry_breaker_ids", [-1]),
        ("logit_bias", {3: 101}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {"3": 1}),
        ("logit_bias", [3]),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words_ids", [[]]),
        ("bad_words_ids", [3]),
        ("logits_processors", [3]),
    ],
    ids=str,
)
def test_a_value_out_of_range_names_its_parameter(field, value):
    with pytest.raises(InvalidRequest, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidRequest, match="min_tokens 5 is more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"mirostat_mode": 2, "top_k": 5}, "mirostat_mode"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "temperature": 0}, "best_of"),
        ({"best_of": 2, "output_kind": "cumulative"}, "output_kind"),
        ({"mirostat_mode": 1, "typical_p": 0.5, "min_p": 0.1}, "mirostat_mode"),
        ({"mirostat_mode": 2, "temperature": 0}, "mirostat_mode"),
        ({"allowed_token_ids": [3, 4], "bad_words_ids": [[3], [4], [5, 6]]}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_are_refused(values, param):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**values)
    assert caught.value.param == param


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="tempersture"):
        SamplingParams(tempersture=1.0)


def test_stop_takes_one_string_or_several():
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_top_k_minus_one_means_off():
    assert SamplingParams(top_k=-1).top_k == 0
