"""A mixture of experts against one expert after the other in fp64, and each token by itself bit for bit."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close


def make_experts(num_experts, hidden, intermediate, dtype, device):
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(num_experts, hidden, intermediate, generator=generator) * intermediate**-0.5
    return w13.to(dtype).to(device), w2.to(dtype).to(device)


def make_tokens(num_tokens, hidden, top_k, num_experts, dtype, device):
    """Rows of wider ones, distinct experts per token, and weights that add up to 1."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden + 16, generator=generator).to(dtype).to(device)[:, :hidden]
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    weights, ids = scores.softmax(-1).topk(top_k)
    return x, (weights / weights.sum(-1, keepdim=True)).to(device), ids.to(torch.int32).to(device)


def expected_moe(x, w13, w2, weights, ids, activation):
    """Token by token: nothing is grouped."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    act = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh")}
    for token, row in enumerate(x.double().cpu()):
        for weight, expert in zip(weights[token].double().tolist(), ids[token].tolist(), strict=True):
            if 0 <= expert < len(w2):
                gate, up = (w13[expert].double().cpu() @ row).chunk(2)
                out[token] += weight * (w2[expert].double().cpu() @ (act[activation](gate) * up))
    return out


CASES = {
    "bf16": (torch.bfloat16, "silu", (0, 1, 18)),
    "fp32": (torch.float32, "gelu_tanh", (7,)),
    "fp16, tiles of 64 rows": (torch.float16, "silu", (40,)),
}


@pytest.mark.parametrize(("dtype", "activation", "counts"), CASES.values(), ids=CASES)
def test_moe_equals_its_experts_one_by_one(device, dtype, activation, counts):
    num_experts = 3 if max(counts) == 40 else 6
    w13, w2 = make_experts(num_experts, 80, 72, dtype, device)
    for num_tokens in counts:
        x, weights, ids = make_tokens(num_tokens, 80, 2, num_experts, dtype, device)
        if num_tokens > 1:
            ids[0, 1], ids[1, 0] = -1, num_experts  # experts of other devices
        size = ok.moe_workspace(num_tokens, 2, num_experts, 80, 72, dtype)
        workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)  # NaN in every floating dtype
        wide = torch.full((num_tokens, 90), float("nan"), dtype=dtype, device=device)
        ok.fused_moe(
            x, w13, w2, weights, ids, activation=activation, out=wide[:, :80], workspace=workspace
        )  # fmt: skip
        expected = expected_moe(x, w13, w2, weights, ids, activation).to(device)
        assert_close(wide[:, :80] / 2, expected / 2, dtype)
        assert wide[:, 80:].isnan().all()


def test_a_token_does_not_depend_on_the_others_bit_for_bit(device):
    w13, w2 = make_experts(4, 80, 72, torch.float32, device)
    x, weights, ids = make_tokens(12, 80, 2, 4, torch.float32, device)
    together = ok.fused_moe(x, w13, w2, weights, ids)
    part = ok.fused_moe(x[5:8], w13, w2, weights[5:8].contiguous(), ids[5:8].contiguous())
    assert torch.equal(part, together[5:8])


def test_arguments_that_do_not_fit_are_refused():
    w13, w2 = make_experts(4, 32, 16, torch.float32, "cpu")
    x, weights, ids = make_tokens(3, 32, 2, 4, torch.float32, "cpu")
    with pytest.raises(ok.ShapeError, match=r"w13 has shape \[4, 16, 32\], expected \[4, 32, 32\]"):
        ok.fused_moe(x, w13[:, :16], w2, weights, ids)
    with pytest.raises(ok.DtypeError, match="topk_ids has dtype int64, expected int32"):
        ok.fused_moe(x, w13, w2, weights, ids.long())
    with pytest.raises(ok.OptionError, match="activation is 'relu', expected 'silu' or 'gelu_tanh'"):
        ok.fused_moe(x, w13, w2, weights, ids, activation="relu")
