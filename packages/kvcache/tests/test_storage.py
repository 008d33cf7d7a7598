import pytest

torch = pytest.importorskip("torch", reason="KVStorage needs torch")
pytest.importorskip("octavo_kernels", reason="KVStorage needs octavo-kernels")

from octavo_kvcache import DEVICE, HOST, BlockCopy, InvalidArgument, KVCacheSpec, KVStorage, UnsupportedSpec

FULL = KVCacheSpec(num_kv_heads=2, head_dim=4)
WINDOW = KVCacheSpec(num_kv_heads=2, head_dim=4, kind="window", window=8)


def numbered(specs, num_blocks=8, block_size=4, **options) -> KVStorage:
    """Storage whose blocks hold their own number, negative for V, plus 100 per layer."""
    storage = KVStorage(specs, num_blocks, block_size, **options)
    for index in range(storage.num_layers):
        for sign, cache in zip((1, -1), storage.layer(index), strict=True):
            cache.copy_(torch.arange(num_blocks).view(-1, 1, 1, 1).expand_as(cache) * sign + 100 * index)
    return storage


def blocks(storage, layer):
    k_cache, v_cache = storage.layer(layer)
    assert (k_cache == k_cache[:, :1, :1, :1]).all()
    assert (v_cache == v_cache[:, :1, :1, :1]).all()
    return k_cache[:, 0, 0, 0].int().tolist(), v_cache[:, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layer_is_two_views_of_one_allocation(dtype):
    storage = KVStorage([KVCacheSpec(3, 64, dtype)] * 2, num_blocks=5, block_size=16)
    k_cache, v_cache = storage.layer(1)
    assert k_cache.shape == v_cache.shape == (5, 3, 16, 64)
    assert k_cache.dtype == getattr(torch, dtype)
    assert k_cache.untyped_storage().data_ptr() == v_cache.untyped_storage().data_ptr()
    assert k_cache.untyped_storage().data_ptr() != storage.layer(0)[0].untyped_storage().data_ptr()
    assert k_cache.untyped_storage().nbytes() * 2 == storage.bytes_per_block * storage.num_blocks
    assert storage.bytes_per_block == 2 * KVCacheSpec(3, 64, dtype).bytes_per_block(16)


def test_null_block_is_zero():
    storage = KVStorage([FULL], num_blocks=3, block_size=4)
    assert all((cache[0] == 0).all() for cache in storage.layer(0))


def test_copies_move_keys_and_values_of_all_layers():
    storage = numbered([FULL, FULL])
    storage.apply([BlockCopy(1, 5), BlockCopy(1, 6)])
    assert blocks(storage, 0) == ([0, 1, 2, 3, 4, 1, 1, 7], [0, -1, -2, -3, -4, -1, -1, -7])
    assert blocks(storage, 1) == ([100, 101, 102, 103, 104, 101, 101, 107], [100, 99, 98, 97, 96, 99, 99, 93])
    storage.apply([])
    assert blocks(storage, 0)[0] == [0, 1, 2, 3, 4, 1, 1, 7]


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        ([(1, 2), (2, 3)], [0, 1, 1, 1, 4]),
        ([(1, 2), (3, 2)], [0, 1, 3, 3, 4]),
        ([(2, 3), (1, 2)], [0, 1, 1, 2, 4]),
        ([(1, 4), (2, 1), (4, 2)], [0, 2, 1, 3, 1]),
    ],
    ids=["chain", "overwritten", "source reused", "swap by a third"],
)
def test_copies_have_the_effect_of_one_after_the_other(copies, expected):
    storage = numbered([FULL], num_blocks=5)
    storage.apply([BlockCopy(src, dst) for src, dst in copies])
    assert blocks(storage, 0)[0] == expected


def test_blocks_go_to_the_host_and_come_back_in_all_layers():
    storage = numbered([FULL, WINDOW, FULL], num_host_blocks=5)
    storage.apply([BlockCopy(6, 3, DEVICE, HOST), BlockCopy(2, 4, DEVICE, HOST)])
    for index in range(3):
        for cache in storage.layer(index):
            cache.fill_(-7)
    storage.apply([BlockCopy(3, 1, HOST, DEVICE), BlockCopy(4, 5, HOST, DEVICE)])
    assert [k[[1, 5], 0, 0, 0].tolist() for k, _ in map(storage.layer, range(3))] == [
        [106, 102],
        [106, 102],
        [206, 202],
    ]
    assert [v[[1, 5], 0, 0, 0].tolist() for _, v in map(storage.layer, range(3))] == [[94, 98], [94, 98], [194, 198]]
    assert all((storage.layer(index)[0][2] == -7).all() for index in range(3))


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        ([("out", 1, 1), ("in", 1, 2)], [0, 1, 1, 3, 4]),
        ([("out", 1, 1), ("copy", 3, 1), ("in", 1, 4)], [0, 3, 2, 3, 1]),
        ([("copy", 3, 1), ("out", 1, 1), ("in", 1, 4)], [0, 3, 2, 3, 3]),
        ([("out", 1, 2), ("out", 2, 1), ("in", 2, 3), ("in", 1, 4)], [0, 1, 2, 1, 2]),
        ([("out", 1, 1), ("out", 2, 1), ("in", 1, 4)], [0, 1, 2, 3, 2]),
        ([("out", 4, 1), ("in", 1, 2), ("in", 1, 3), ("out", 3, 1), ("in", 1, 1)], [0, 4, 4, 4, 4]),
    ],
    ids=["there and back", "given away after", "written before", "ids of the other tier", "overwritten", "many"],
)
def test_copies_between_tiers_have_the_effect_of_one_after_the_other(copies, expected):
    tiers = {"out": (DEVICE, HOST), "in": (HOST, DEVICE), "copy": (DEVICE, DEVICE)}
    storage = numbered([FULL], num_blocks=5, num_host_blocks=3)
    storage.apply([BlockCopy(src, dst, *tiers[kind]) for kind, src, dst in copies])
    assert blocks(storage, 0)[0] == expected


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_scales_are_copied_and_swapped_with_their_block(dtype):
    storage = KVStorage([KVCacheSpec(2, 16, dtype)] * 3, num_blocks=6, block_size=4, num_host_blocks=3)
    assert storage.bytes_per_block == 3 * KVCacheSpec(2, 16, dtype).bytes_per_block(4)
    vectors = [cache for index in range(3) for cache in storage.layer(index)]
    scales = [scale for index in range(3) for scale in storage.scales(index)]
    assert all(cache.dtype == getattr(torch, dtype) and cache.shape == (6, 2, 4, 16) for cache in vectors)
    assert all(scale.shape == (6, 2, 4) and scale.is_contiguous() for scale in scales)
    assert not any(scale[0].any() for scale in scales)
    for number, tensor in enumerate(vectors + scales):
        tensor[1:] = torch.arange(1, 6).view(-1, *[1] * (tensor.dim() - 1)).add(8 * number).to(tensor.dtype)
    storage.apply([BlockCopy(2, 5), BlockCopy(3, 1, DEVICE, HOST), BlockCopy(4, 3), BlockCopy(1, 4, HOST, DEVICE)])
    for number, tensor in enumerate(vectors + scales):
        expected = (torch.tensor([1, 2, 4, 3, 2]) + 8 * number).to(tensor.dtype).float()
        assert (tensor[1:].float() == expected.view(-1, *[1] * (tensor.dim() - 1))).all(), number


def test_elements_that_are_no_codes_have_no_scales():
    storage = KVStorage([FULL, KVCacheSpec(2, 4, "int8")], 4, 4)
    assert storage.scales(0) is None
    assert storage.scales(1) is not None
    with pytest.raises(IndexError, match="layer 2 does not exist"):
        storage.scales(2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copies_on_a_gpu_do_not_wait_for_it(dtype):
    storage = KVStorage([KVCacheSpec(2, 16, dtype)] * 2, num_blocks=6, block_size=4, device="cuda", num_host_blocks=3)
    copies = [BlockCopy(2, 5), BlockCopy(3, 1, DEVICE, HOST), BlockCopy(4, 3), BlockCopy(1, 4, HOST, DEVICE)]
    for index in range(2):
        for cache in storage.layer(index):
            cache.copy_(torch.arange(6).view(-1, 1, 1, 1).expand_as(cache))
    storage.apply(copies)  # compiles, and pins memory for block ids
    torch.cuda.set_sync_debug_mode("error")
    try:
        storage.apply([BlockCopy(5, 2)])
        storage.apply(copies)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert blocks(storage, 1)[0] == [0, 1, 2, 3, 4, 2]


def test_groups_of_one_shape_share_tensors():
    storage = KVStorage([WINDOW, WINDOW, FULL], num_blocks=4, block_size=4)
    pointers = [storage.layer(index)[0].data_ptr() for index in range(3)]
    assert pointers[2] == pointers[0] != pointers[1]
    assert storage.bytes_per_block == 2 * FULL.bytes_per_block(4)


def test_groups_of_another_shape_have_their_own():
    other = KVCacheSpec(num_kv_heads=1, head_dim=4, kind="window", window=8)
    storage = KVStorage([other, FULL], num_blocks=4, block_size=4)
    assert storage.bytes_per_block == FULL.bytes_per_block(4) + other.bytes_per_block(4)
    assert storage.layer(0)[0].shape == (4, 1, 4, 4)


@pytest.mark.parametrize(
    ("copy", "error", "message"),
    [
        (BlockCopy(1, 8), InvalidArgument, "from device block 1 to device block 8"),
        (BlockCopy(-1, 2), InvalidArgument, "from device block -1 to device block 2"),
        (BlockCopy(1, 0), InvalidArgument, "from device block 1 to device block 0"),
        (BlockCopy(1, 2, DEVICE, HOST), InvalidArgument, r"host block 2 is out of range: .* dst in \[1, 0\)"),
        (BlockCopy(1, 2, HOST, HOST), UnsupportedSpec, "'host' to 'host'"),
        (BlockCopy(1, 2, DEVICE, "disk"), UnsupportedSpec, "'device' to 'disk'"),
    ],
    ids=["past the end", "negative", "null block", "no host tier", "within the host", "other tier"],
)
def test_copy_that_can_not_be_done_is_refused_before_any(copy, error, message):
    storage = numbered([FULL])
    with pytest.raises(error, match=message):
        storage.apply([BlockCopy(1, 2), copy])
    assert blocks(storage, 0)[0] == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("specs", "num_blocks", "block_size"), [([], 4, 4), ([FULL], 1, 4), ([FULL], 4, 0)])
def test_storage_of_nothing_is_refused(specs, num_blocks, block_size):
    with pytest.raises(InvalidArgument, match="at least 1 layer, 2 blocks"):
        KVStorage(specs, num_blocks, block_size)


def test_unknown_layer_is_an_index_error():
    with pytest.raises(IndexError, match="layer 2 does not exist; the storage has 1 layers"):
        KVStorage([FULL], 4, 4).layer(2)
