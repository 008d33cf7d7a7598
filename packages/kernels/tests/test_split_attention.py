"""Attention of long sequences from few queries: split over chunks of keys, with the same bits in every batch."""

from dataclasses import replace

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import _split_workspace
from octavo_kernels.testing import PagedInputs, assert_close, make_paged_inputs

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float16}
EDGES = ([1, 1, 0, 2, 1], [256, 257, 300, 513, 3])


def attend(inputs: PagedInputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse, poisoned beforehand."""
    out = torch.full_like(inputs.q, float("nan"))
    lse = torch.full(inputs.q.shape[:2], float("nan"), device=inputs.q.device)
    ok.paged_attention(**(inputs.arguments() | options), out=out, lse=lse)
    return out, lse


def rows_of(inputs: PagedInputs, sequence: int, num_queries: int) -> PagedInputs:
    """Return a call of one sequence by its last queries alone."""
    stop = int(inputs.query_start_loc[sequence + 1])
    one = slice(sequence, sequence + 1)
    return replace(
        inputs,
        q=inputs.q[stop - num_queries : stop],
        query_start_loc=torch.tensor([0, num_queries], dtype=torch.int32, device=inputs.q.device),
        seq_lens=inputs.seq_lens[one],
        block_table=inputs.block_table[one],
        max_query_len=num_queries,
    )


@pytest.mark.parametrize(
    ("num_bytes", "batch_invariant"),
    [(None, True), (2500, True), (80, True), (2500, False)],
    ids=["all slots", "some slots", "no slots", "free"],
)
def test_lengths_around_chunks(oracle, device, batch_invariant, num_bytes):
    inputs = make_paged_inputs(*EDGES, **SHAPE, num_padding_rows=2, layout="nhd", device=device)
    expected_lse = torch.empty(inputs.q.shape[:2], device=device)
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments(), lse=expected_lse)
    workspace = None if num_bytes is None else torch.empty(num_bytes, dtype=torch.uint8, device=device)
    out, lse = attend(inputs, batch_invariant=batch_invariant, workspace=workspace)
    assert_close(out[:-2], expected[:-2])
    assert_close(lse[:-2], expected_lse[:-2])
    assert out[-2:].isnan().all()
    assert lse[-2:].isnan().all()


@pytest.mark.parametrize(
    "options",
    [{"window": 300}, {"window": 280, "soft_cap": 1.5, "alibi": True, "sinks": True}, {"causal": False}],
    ids=["window", "all", "bidirectional"],
)
def test_options_over_several_chunks(oracle, device, options):
    inputs = make_paged_inputs([1, 2], [600, 301], **SHAPE, device=device)
    if options.get("alibi"):
        heads = {"alibi_slopes": torch.tensor([0.5, 0.1, 0.01, 0.0]), "sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0])}
        options = {"window": 280, "soft_cap": 1.5} | {name: values.to(device) for name, values in heads.items()}
    expected_lse = torch.empty(inputs.q.shape[:2], device=device)
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments(), **options, lse=expected_lse)
    out, lse = attend(inputs, **options)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


def test_chunks_grow_behind_the_near_positions(oracle, device):
    inputs = make_paged_inputs([1], [17_500], **SHAPE | {"num_heads": 1, "num_kv_heads": 1})
    inputs = replace(inputs, k_cache=inputs.k_cache.nan_to_num(), v_cache=inputs.v_cache.nan_to_num())
    options = {"window": 1500}  # from before position 16384, where chunks begin to be longer
    arguments = {name: x.to(device) if hasattr(x, "to") else x for name, x in inputs.arguments().items()}
    wide = {name: x.to(device) if hasattr(x, "to") else x for name, x in inputs.to(torch.float64).arguments().items()}
    assert_close(ok.paged_attention(**arguments, **options), oracle(ok.paged_attention, **wide, **options))
    assert [_split_workspace.num_chunks(length) for length in (0, 1, 256, 257, 16384, 16385, 17409)] == [
        0,
        1,
        1,
        2,
        64,
        65,
        66,
    ]


@pytest.fixture
def _products_by_row(monkeypatch, interpreted):
    """Give the interpreter products whose rows do not depend on their place, which a matrix library's may."""
    if not interpreted:
        return
    numpy = pytest.importorskip("numpy")

    def multiply(a, b, dtype):
        return sum(a[:, column, None].astype(dtype) * b[column].astype(dtype) for column in range(a.shape[1]))

    monkeypatch.setattr(numpy, "matmul", multiply)


@pytest.mark.usefixtures("_products_by_row")
def test_bits_of_a_query_do_not_depend_on_its_batch(backend, device):
    if backend is ok.Backend.REFERENCE:
        pytest.skip("not promised")
    dtype = torch.float16 if backend is ok.Backend.TRITON else torch.float32
    options = {"sinks": torch.tensor([0.5, -0.5, 1.0, 0.0], device=device), "window": 450}
    inputs = make_paged_inputs([40, 1, 2], [530, 40, 300], **SHAPE | {"dtype": dtype}, device=device, seed=1)
    small = torch.empty(64, dtype=torch.uint8, device=device)
    out, lse = attend(inputs, **options)
    # Rows are split or not, in tiles of 64 or of 128 rows, by their sequence's own queries and by the workspace.
    for sequence, stop, num_queries in ((0, 40, 1), (0, 40, 7), (0, 40, 33), (1, 41, 1), (2, 43, 2)):
        for workspace in (None, small):
            alone, alone_lse = attend(rows_of(inputs, sequence, num_queries), **options, workspace=workspace)
            assert torch.equal(alone, out[stop - num_queries : stop])
            assert torch.equal(alone_lse, lse[stop - num_queries : stop])


def test_int8_cache_over_several_chunks(oracle, device):
    inputs = make_paged_inputs([1, 2], [300, 513], **SHAPE, device=device)
    arguments, wide = inputs.arguments(), inputs.to(torch.float64).arguments()
    # One scale per head, by a stride of zero.
    scales = torch.tensor([0.03, 0.05], device=device)[None, :, None].expand(arguments["k_cache"].shape[:3])
    for name in ("k", "v"):
        whole = (arguments[f"{name}_cache"] / scales[..., None]).nan_to_num().round().clamp(-127, 127).to(torch.int8)
        arguments |= {f"{name}_cache": whole, f"{name}_scale": scales}
        wide[f"{name}_cache"] = whole.double() * scales.double()[..., None]
    assert_close(ok.paged_attention(**arguments), oracle(ok.paged_attention, **wide))


@pytest.mark.parametrize("scaled", [True, False], ids=["scales", "no scales"])
def test_fp8_cache(oracle, device, scaled):
    inputs = make_paged_inputs([1, 34], [300, 36], **SHAPE, device=device, layout="nhd")
    arguments, wide = inputs.arguments(), inputs.to(torch.float64).arguments()
    for name in ("k", "v"):
        cache = arguments[f"{name}_cache"]
        scales = cache.float().abs().amax(-1) / 448 if scaled else torch.ones(cache.shape[:3], device=device)
        codes = (cache.nan_to_num() / scales[..., None].nan_to_num(1.0)).to(torch.float8_e4m3fn)
        arguments |= {f"{name}_cache": codes} | ({f"{name}_scale": scales} if scaled else {})
        wide[f"{name}_cache"] = codes.double() * scales.double()[..., None]
    assert_close(ok.paged_attention(**arguments), oracle(ok.paged_attention, **wide))


def test_workspace_size_is_enough_and_bounded(device):
    size = ok.attention_workspace(7, 720, 4, 2, 16, max_query_len=3)
    assert size == -(-4 * (3 * 7 + 2) // 16) * 16 + 7 * 3 * (3 * 4) * (16 + 2) * 4
    inputs = make_paged_inputs([1], [257], **SHAPE, device=device)
    whole = attend(inputs)[0]
    assert torch.equal(attend(inputs, workspace=torch.empty(size, dtype=torch.uint8, device=device))[0], whole)
    assert ok.attention_workspace(1024, 1 << 20, 64, 8, 128, max_query_len=99) < (128 << 20) + 16 * 1024
    with pytest.raises(ok.OptionError, match="attention_workspace: head_dim is 0, expected at least 1"):
        ok.attention_workspace(1, 1, 1, 1, 0)
    with pytest.raises(ok.OptionError, match="num_heads is 3, expected a multiple of 2"):
        ok.attention_workspace(1, 1, 3, 2, 16)


def test_a_workspace_of_another_form_is_refused(backend, device):
    if backend is not ok.Backend.TRITON:
        pytest.skip("the other backends need no workspace")
    inputs = make_paged_inputs([1], [20], **SHAPE, device=device)
    with pytest.raises(ok.DtypeError, match="workspace has dtype float32, expected uint8"):
        attend(inputs, workspace=torch.empty(4096, device=device))
    with pytest.raises(ok.ShapeError, match=r"paged_attention: workspace has 16 bytes, expected at least 32"):
        attend(inputs, workspace=torch.empty(16, dtype=torch.uint8, device=device))
    with pytest.raises(ok.OptionError, match=r"data_ptr.. % 16 is 8, expected 0"):
        attend(inputs, workspace=torch.empty(4096, dtype=torch.uint8, device=device)[8:])
