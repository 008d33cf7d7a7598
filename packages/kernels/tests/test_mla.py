"""mla_decode of the backend under test against the reference in fp64."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

QUERY_LENS, SEQ_LENS, BLOCK_SIZE = [1, 0, 2, 1, 1, 3], [1, 4, 33, 15, 17, 2], 16


def make_inputs(device: str, dtype=torch.float32, num_heads=20, latent_dim=48, rope_dim=16) -> dict:
    """Return permuted blocks with NaN in every unwritten slot, ids past the end that do not exist, and padding rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    num_tokens, num_blocks = sum(QUERY_LENS) + 2, 12
    cache = torch.full((num_blocks, BLOCK_SIZE, latent_dim + rope_dim), float("nan"), dtype=dtype)
    table = torch.full((len(SEQ_LENS), 4), num_blocks + 7, dtype=torch.int32)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    for sequence, seq_len in enumerate(SEQ_LENS):
        for position in range(seq_len):
            if position % BLOCK_SIZE == 0:
                table[sequence, position // BLOCK_SIZE] = free.pop()
            cache[table[sequence, position // BLOCK_SIZE], position % BLOCK_SIZE] = normal(latent_dim + rope_dim)
    tensors = {
        "q_nope": normal(num_tokens, num_heads, latent_dim),
        "q_pe": normal(num_tokens, num_heads, rope_dim),
        "ckv_cache": cache,
        "query_start_loc": torch.tensor([0, *QUERY_LENS]).cumsum(0).to(torch.int32),
        "seq_lens": torch.tensor(SEQ_LENS, dtype=torch.int32),
        "block_table": table,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"scale": 0.15}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ragged_batches(oracle, device, dtype):
    inputs = make_inputs(device, dtype)
    out = torch.full_like(inputs["q_nope"], float("nan"))
    lse = torch.full(out.shape[:2], float("nan"), device=device)
    assert ok.mla_decode(**inputs, out=out, lse=lse) is out
    wide = {name: x.double() if hasattr(x, "dtype") and x.is_floating_point() else x for name, x in inputs.items()}
    expected_lse = torch.empty_like(lse)
    expected = oracle(ok.mla_decode, **wide, lse=expected_lse)
    rows = sum(QUERY_LENS)
    assert_close(out[:rows], expected[:rows])
    torch.testing.assert_close(lse[:rows], expected_lse[:rows], rtol=1e-3, atol=2e-3)
    assert out[rows:].isnan().all()
    assert lse[rows:].isnan().all()


def test_a_query_before_its_sequence_sees_nothing(device):
    inputs = make_inputs(device)
    lse = torch.empty(inputs["q_nope"].shape[:2], device=device)
    out = ok.mla_decode(**inputs, lse=lse)
    assert torch.equal(out[5], torch.zeros_like(out[5]))  # the first of three queries of a sequence of two tokens
    assert (lse[5] == -float("inf")).all()


def test_latent_attention_is_attention_of_its_projections(device):
    inputs = make_inputs(device, num_heads=2, latent_dim=16, rope_dim=16)
    up_keys, up_values = (torch.randn(2, 16, 8, device=device) for _ in range(2))  # [num_heads, latent_dim, head_dim]
    latent = inputs["ckv_cache"][inputs["block_table"][3, 0], :15]
    query = torch.randn(2, 8, device=device)
    inputs["q_nope"][3] = torch.einsum("hd,hld->hl", query, up_keys)
    actual = torch.einsum("hl,hld->hd", ok.mla_decode(**inputs)[3], up_values)
    keys = torch.cat([torch.einsum("kl,hld->khd", latent[:, :16], up_keys), latent[:, None, 16:].expand(-1, 2, -1)], -1)
    values = torch.einsum("kl,hld->khd", latent[:, :16], up_values)
    whole_query = torch.cat([query, inputs["q_pe"][3]], -1)
    weights = (0.15 * torch.einsum("hd,khd->hk", whole_query, keys)).softmax(-1)
    torch.testing.assert_close(actual, torch.einsum("hk,khd->hd", weights, values), rtol=1e-4, atol=1e-4)


def test_misfits_are_refused(device):
    inputs = make_inputs(device)
    with pytest.raises(ok.ShapeError, match=r"ckv_cache has shape .*63\], expected \[num_blocks, block_size, 64\]"):
        ok.mla_decode(**inputs | {"ckv_cache": inputs["ckv_cache"][..., 1:]})
    with pytest.raises(ok.OptionError, match="scale is inf"):
        ok.mla_decode(**inputs | {"scale": float("inf")})
