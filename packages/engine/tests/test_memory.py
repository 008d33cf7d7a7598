import pytest

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.runner.memory import MemoryPlan, available_bytes, plan_host_tier, plan_memory

SIZES = {"bytes_per_block": 1000, "block_size": 16, "max_num_seqs": 4, "model_max_len": 256, "free_bytes": 400_000}


def plan(**changes):
    return plan_memory(**({"max_model_len": None, "num_blocks": None, "kv_cache_bytes": None} | SIZES | changes))


def test_given_blocks_are_taken():
    chosen = plan(num_blocks=40)
    assert (chosen.num_blocks, chosen.num_bytes, chosen.max_model_len) == (40, 40_000, 256)
    assert chosen.reason == "num_blocks was given"


def test_given_bytes_are_turned_into_blocks():
    assert plan(kv_cache_bytes=50_999).num_blocks == 50


def test_no_more_is_taken_than_the_sequences_can_use():
    chosen = plan()
    assert chosen.num_blocks == 4 * 16 + 1
    assert chosen.reason == "what 4 sequences of 256 tokens can use"


def test_a_quarter_of_the_free_memory_is_the_default():
    assert plan(free_bytes=200_000).num_blocks == 50


def test_the_context_is_cut_to_what_fits_and_the_reason_says_so():
    chosen = plan(num_blocks=9)
    assert chosen.max_model_len == 128
    assert "cut from 256 to the 128 tokens" in chosen.reason


def test_a_context_that_does_not_fit_is_refused_with_the_ways_out():
    with pytest.raises(InvalidConfig) as caught:
        plan(num_blocks=9, max_model_len=200)
    assert "num_blocks to 14 or more" in str(caught.value)
    assert "kv_cache_bytes to 14000 or more" in str(caught.value)
    assert "max_model_len to 128 or less" in str(caught.value)


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(InvalidConfig, match="more than the model's context of 256"):
        plan(max_model_len=257)


def test_this_machine_has_memory():
    assert available_bytes() > 1 << 20


def host(**changes):
    sizes = {"bytes_per_block": 1000, "num_device_blocks": 50, "host_kv_bytes": None, "on_gpu": True}
    return plan_host_tier(**(sizes | {"free_bytes": 400_000} | changes))


def test_a_cpu_has_no_host_tier_unless_it_is_asked_for():
    chosen = host(on_gpu=False)
    assert (chosen.num_blocks, chosen.num_bytes) == (0, 0)
    assert "the device's memory is the host's" in chosen.reason
    assert host(on_gpu=False, host_kv_bytes=7999).num_blocks == 7


def test_a_gpu_has_as_much_on_the_host_as_it_can_use_within_limits():
    assert host().num_blocks == 50
    assert host(num_device_blocks=500).num_blocks == 100
    assert host(num_device_blocks=1 << 40, free_bytes=1 << 40).num_bytes == (4 << 30) // 1000 * 1000
    assert host(free_bytes=5000) == host(free_bytes=0)
    assert host(free_bytes=0).num_blocks == 0


def test_host_bytes_that_hold_no_block_are_refused():
    assert host(host_kv_bytes=0).num_blocks == 0
    assert host(host_kv_bytes=2000).num_blocks == 2
    with pytest.raises(InvalidConfig, match=r"holds 1 blocks of 1000 bytes.* give 2000 or more, or 0"):
        host(host_kv_bytes=1999)


@pytest.mark.parametrize(
    ("num_blocks", "max_model_len", "share", "num_pinnable"),
    [(101, 320, 0.25, 25), (101, 1400, 0.25, 12), (101, 1401, 0.25, 12), (101, 1600, 0.25, 0), (101, 16, 0.0, 0)],
    ids=["a share", "what the longest sequence leaves", "rounded up", "nothing left", "none wanted"],
)
def test_pins_leave_room_for_the_longest_sequence(num_blocks, max_model_len, share, num_pinnable):
    plan = MemoryPlan(num_blocks, num_bytes=0, max_model_len=max_model_len, reason="")
    assert plan.num_pinnable(16, share) == num_pinnable


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InvalidConfig, match="max_pinned_share must be at least 0 and below 1"):
        EngineConfig(max_pinned_share=share)
