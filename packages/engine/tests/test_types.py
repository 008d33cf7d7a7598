import math

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.types import Request, SamplingParams, TokenSpan


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
        ("logprobs", 21),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
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


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="tempersture"):
        SamplingParams(tempersture=1.0)


def test_stop_takes_one_string_or_several():
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_top_k_minus_one_means_off():
    assert SamplingParams(top_k=-1).top_k == 0


def test_an_unset_seed_is_drawn_once_and_kept():
    request = Request(request_id="r", inputs=(TokenSpan((1, 2)), TokenSpan((3,))))
    assert request.seed == request.seed >= 0
    assert request.prompt_token_ids == [1, 2, 3]
    assert Request(request_id="r", inputs=(), sampling=SamplingParams(seed=7)).seed == 7
