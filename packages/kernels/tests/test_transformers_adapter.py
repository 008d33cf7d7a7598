"""Attention inside models of Transformers: logits and tokens of Transformers' own attention."""

import sys

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.adapters.transformers import attention_forward, register


@pytest.fixture(autouse=True)
def _on_the_cpu(backend):
    if backend is not ok.Backend.CPU:
        pytest.skip("the adapter does nothing of its own on other backends")


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=7, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_are_those_of_eager_attention(model, side):
    ids = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, 8:] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(register())
        actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_generation_goes_on_as_with_eager_attention(model):
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    model.set_attn_implementation(register())
    assert torch.equal(model.generate(ids, **settings), expected)


def test_sinks_caps_and_encoders(device):
    module = torch.nn.Module()
    q, k, v = (torch.randn(2, heads, 5, 16, device=device) for heads in (4, 2, 2))
    sinks = torch.linspace(-1, 1, 4, device=device)
    out, weights = attention_forward(module, q, k, v, None, softcap=2.0, s_aux=sinks, is_causal=False)
    assert out.shape == (2, 5, 4, 16)
    assert weights is None
    scores = 2.0 * torch.tanh(torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 4 / 2.0)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, torch.einsum("bhqk,bhkd->bqhd", scores, v.repeat_interleave(2, 1)))


def test_training_and_names_in_use_are_refused():
    pytest.importorskip("transformers")
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ok.OptionError, match=r"dropout is 0.1, expected 0.0"):
        attention_forward(torch.nn.Module(), q, q, q, None, dropout=0.1)
    with pytest.raises(ok.OptionError, match="expected no gradient"):
        attention_forward(torch.nn.Module(), q.requires_grad_(), q, q, None)
    with pytest.raises(ok.OptionError, match="name is 'sdpa', expected a name that Transformers does not know"):
        register("sdpa")


def test_transformers_is_imported_when_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers"):
        register()
