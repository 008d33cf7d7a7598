"""The plan that the layers of a step share: used again for equal indices, never for others."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.cpu.fallback import plan
from octavo_kernels.testing import assert_close, make_paged_inputs


@pytest.fixture(autouse=True)
def cpu_backend(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "cpu")
    plan._memo.entry = None


def expected(inputs, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setenv("OCTAVO_BACKEND", "reference")
        return ok.paged_attention(**inputs.to(torch.float64).arguments(), **options)


def test_equal_indices_in_other_tensors_use_the_plan_again():
    inputs = make_paged_inputs([1, 7, 1], [20, 30, 5])
    arguments = inputs.arguments()
    ok.paged_attention(**arguments)
    first = plan._memo.entry
    for name in ("query_start_loc", "seq_lens", "block_table"):
        arguments[name] = arguments[name].clone()
    ok.paged_attention(**arguments)
    assert plan._memo.entry is first


@pytest.mark.parametrize("name", ["seq_lens", "block_table"])
def test_an_index_changed_in_place_is_noticed(name, monkeypatch):
    inputs = make_paged_inputs([1, 1], [33, 17], seed=3)
    arguments = inputs.arguments()
    ok.paged_attention(**arguments)
    if name == "seq_lens":
        inputs.seq_lens.copy_(torch.tensor([18, 9], dtype=torch.int32))
    else:
        inputs.block_table[:, 0] = inputs.block_table[:, 0].flip(0).clone()
    assert_close(ok.paged_attention(**arguments), expected(inputs, monkeypatch))


def test_caches_of_other_strides_and_masks_share_indices_but_not_results(monkeypatch):
    tiles = make_paged_inputs([1, 9, 1], [40, 21, 16], seed=5, layout="hnd")
    tokens = make_paged_inputs([1, 9, 1], [40, 21, 16], seed=5, layout="nhd")
    for inputs in (tiles, tokens):
        for options in ({}, {"causal": False}, {"window": 6}, {"window": 6, "causal": False}):
            out = ok.paged_attention(**inputs.arguments(), **options)
            assert_close(out, expected(inputs, monkeypatch, **options))
