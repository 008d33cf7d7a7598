import pytest

torch = pytest.importorskip("torch", reason="the runner needs the extra octavo-engine[local]")

from octavo_engine.runner.transfer_speed import measure_transfer
from octavo_kvcache import KVCacheSpec
from octavo_kvcache.storage import KVStorage


@pytest.mark.parametrize("num_host_blocks", [2, 9, 40])
def test_copies_are_timed_and_nothing_is_changed(num_host_blocks):
    storage = KVStorage([KVCacheSpec(2, 16)] * 2, num_blocks=20, block_size=16, num_host_blocks=num_host_blocks)
    k_cache, _ = storage.layer(1)
    k_cache.copy_(torch.randn(k_cache.shape))
    before = k_cache.clone()
    cost = measure_transfer(storage)
    assert cost.bytes_per_block == storage.bytes_per_block
    assert cost.bytes_per_second > 0
    assert cost.seconds_per_move >= 0
    assert cost.seconds(10) > cost.seconds(1) > cost.seconds_per_move
    assert torch.equal(k_cache, before)
