"""Searches that an engine cannot run are refused before they start, with the way out."""

import pytest

from octavo_engine.beam_limits import BeamLimits
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.errors import InvalidRequest

LIMITS = BeamLimits(max_width=8, num_blocks=20, block_size=4)


def test_beams_share_the_prompts_full_blocks_and_nothing_else_at_worst():
    assert LIMITS.num_blocks_wanted(1, 10, 7) == 4  # 16 tokens are computed
    assert LIMITS.num_blocks_wanted(3, 10, 7) == 2 + 3 * 2
    assert LIMITS.num_blocks_wanted(3, 10, 8) == 2 + 3 * 3
    assert LIMITS.num_blocks_wanted(3, 8, 1) == 2  # nothing is written behind the prompt


@pytest.mark.parametrize(
    ("width", "num_output_tokens", "says"),
    [(9, 4, "at most 8 beams run at once"), (8, 20, "may need 50 blocks of the KV cache, which has 20")],
)
def test_a_search_that_is_too_large_is_refused(width: int, num_output_tokens: int, says: str):
    with pytest.raises(InvalidRequest, match=says) as caught:
        LIMITS.check(BeamSearchParams(beam_width=width), 10, num_output_tokens)
    assert caught.value.param == "beam_width"


def test_a_search_that_just_fits_is_taken():
    LIMITS.check(BeamSearchParams(beam_width=6), 10, 11)
