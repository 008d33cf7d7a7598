import pytest

from octavo_kvcache import InvalidArgument, KVCacheSpec, KVGroup, UnsupportedSpec, group_specs


def test_bytes_per_block_counts_keys_and_values():
    assert KVCacheSpec(3, 64, "bfloat16").bytes_per_block(16) == 2 * 3 * 64 * 16 * 2
    assert KVCacheSpec(8, 128).bytes_per_block(32) == 2 * 8 * 128 * 32 * 4


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_take_a_byte_and_each_vector_a_scale(dtype):
    spec = KVCacheSpec(3, 64, dtype)
    assert spec.has_scales
    assert not KVCacheSpec(3, 64).has_scales
    assert spec.bytes_per_block(16) == 2 * 3 * 16 * (64 + 4)


def test_equal_specs_form_a_group():
    full, window = KVCacheSpec(2, 8), KVCacheSpec(2, 8, kind="window", window=4)
    assert group_specs([window, full, window]) == (KVGroup(window, (0, 2)), KVGroup(full, (1,)))
    assert group_specs([]) == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "latent"}, UnsupportedSpec, "'latent'"),
        ({"dtype": "float8_e5m2"}, UnsupportedSpec, "'float8_e5m2'"),
        ({"num_kv_heads": 0}, InvalidArgument, "got 0, 8"),
        ({"head_dim": -1}, InvalidArgument, "got 2, -1"),
        ({"window": 4}, InvalidArgument, "use kind='window'"),
        ({"kind": "window"}, InvalidArgument, "got None"),
        ({"kind": "window", "window": 0}, InvalidArgument, "got 0"),
    ],
    ids=str,
)
def test_spec_that_can_not_be_served_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        KVCacheSpec(**{"num_kv_heads": 2, "head_dim": 8, **arguments})
