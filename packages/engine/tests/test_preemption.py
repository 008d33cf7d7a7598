"""The choice between swapping and computing again."""

import logging

import pytest

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.preemption import PreemptionPolicy, PreemptionStats, TransferCost
from octavo_kvcache import SwapSize

TRANSFER = TransferCost(bytes_per_block=1000, bytes_per_second=1e6, seconds_per_move=0.01)  # 1 ms a block


def policy(**options) -> PreemptionPolicy:
    return PreemptionPolicy(TRANSFER, 16, **options)


def alone(num_blocks: int) -> SwapSize:
    """The size of a sequence that shares nothing."""
    return SwapSize(num_out=num_blocks, num_in=num_blocks, num_lost=num_blocks)


def test_a_long_sequence_is_swapped_and_a_short_one_is_computed_again():
    chosen = policy(seconds_per_token=0.001)  # 16 ms a block, against 2 ms and 20 ms in all
    assert [chosen.prefers_swap(alone(num_blocks)) for num_blocks in (1, 2, 100)] == [False, True, True]


def test_fast_computation_is_preferred_to_slow_copies():
    assert not policy(seconds_per_token=0.0001).prefers_swap(alone(1000))


def test_what_others_hold_costs_little_to_compute_again():
    chosen = policy(seconds_per_token=0.001)
    assert not chosen.prefers_swap(SwapSize(num_out=50, num_in=4, num_lost=4))
    assert chosen.prefers_swap(SwapSize(num_out=0, num_in=4, num_lost=4))


def test_a_mode_other_than_auto_leaves_no_choice():
    assert not policy(mode="recompute", seconds_per_token=1.0).prefers_swap(alone(100))
    assert policy(mode="swap", seconds_per_token=1e-9).prefers_swap(alone(1))


def test_tokens_are_timed_by_the_steps_that_compute_prompts():
    measured = policy()
    assert measured.seconds_per_token is None
    assert not measured.prefers_swap(alone(100))  # nothing is known yet
    measured.begin_step(8, 8, now=1.0)  # decodes only
    measured.end_step(now=2.0)
    assert measured.seconds_per_token is None
    measured.begin_step(100, 3, now=2.5)
    measured.end_step(now=3.0)
    assert measured.seconds_per_token == pytest.approx(0.005)
    measured.begin_step(1000, 3, now=3.0)
    measured.end_step(now=4.0)
    assert measured.seconds_per_token == pytest.approx((0.9 * 0.5 + 1.0) / (0.9 * 100 + 1000))


def test_a_step_begins_when_the_one_before_it_ends():
    measured = policy()
    measured.begin_step(100, 1, now=0.0)
    measured.begin_step(100, 1, now=0.1)
    measured.end_step(now=1.0)
    measured.end_step(now=2.0)
    assert measured.seconds_per_token == pytest.approx(0.01)


def test_the_choice_and_its_inputs_can_be_seen(caplog):
    chosen = policy(seconds_per_token=0.001)
    with caplog.at_level(logging.DEBUG, logger="octavo_engine.preemption"):
        chosen.prefers_swap(SwapSize(num_out=3, num_in=2, num_lost=5))
    assert caplog.messages == [
        "preemption: swapping 3 blocks out and 2 in takes 0.025000 s, computing 5 blocks again 0.080000 s: swap"
    ]
    assert chosen.stats(4, 2) == PreemptionStats(
        num_recomputed=4, num_swapped=2, seconds_per_token=0.001, bytes_per_second=1e6, seconds_per_move=0.01
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preemption_mode": "never"}, "preemption_mode 'never' is not one of auto, recompute, swap"),
        ({"preemption_mode": "swap", "host_kv_bytes": 0}, "host_kv_bytes is 0"),
        ({"host_kv_bytes": -1}, "host_kv_bytes must be at least 0, got -1"),
    ],
)
def test_settings_that_can_not_be_are_refused(options, message):
    with pytest.raises(InvalidConfig, match=message):
        EngineConfig(**options)
