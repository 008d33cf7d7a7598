"""Layers: fused linears, embedding and head, norm with residual, the gated block, against plain torch."""

from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.layers.embedding import Embedding, LMHead
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.mlp import GatedMLP
from octavo_engine.layers.norm import RMSNorm
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import QuantMethod, Shard, WeightSlot
from octavo_engine.quant.packed import Packed

OPTIONS = LayerOptions()
every_method = pytest.mark.parametrize(
    "options", [OPTIONS, LayerOptions(quant=Packed())], ids=["unquantized", "packed"]
)


def fill(slots: Iterator[WeightSlot]) -> dict[str, Tensor]:
    """Fill slots with random values; returns them by name."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for slot in slots:
        weights[slot.name] = torch.randn(slot.shape, generator=generator)
        slot.fill(weights[slot.name])
    return weights


def random_input(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@every_method
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_fused_linear_is_its_shards_side_by_side(options: LayerOptions, bias: bool) -> None:
    linear = Linear(6, [Shard("q_proj", 4), Shard("k_proj", 2), Shard("v_proj", 3)], bias=bias, options=options)
    weights = fill(linear.slots("attn."))
    linear.finish()
    x = random_input(5, 6)
    parts = [F.linear(x, weights[f"attn.{name}_proj.weight"], weights.get(f"attn.{name}_proj.bias")) for name in "qkv"]
    assert ("attn.q_proj.bias" in weights) == bias
    torch.testing.assert_close(linear(x), torch.cat(parts, dim=-1))


def test_linear_leaves_the_product_to_its_method() -> None:
    class Halves(QuantMethod[Tensor]):
        def create(
            self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
        ) -> Tensor:
            return torch.zeros(out_features, in_features, dtype=torch.int8)

        def slots(self, parameters: Tensor, shards: Sequence[Shard], prefix: str) -> Iterator[WeightSlot]:
            yield WeightSlot.into(f"{prefix}{shards[0].name}.halves", parameters)

        def apply(self, parameters: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
            return F.linear(x, parameters.float() / 2)

    linear = Linear(2, [Shard("w", 1)], bias=False, options=LayerOptions(quant=Halves()))
    (slot,) = linear.slots("a.")
    assert slot.name == "a.w.halves"
    slot.fill(torch.full((1, 2), 3.0))
    assert linear(torch.ones(1, 2)).tolist() == [[3.0]]


@every_method
def test_tied_head_has_no_slot_and_multiplies_by_the_embedding(options: LayerOptions) -> None:
    embedding = Embedding(7, 4, options=options)
    head = LMHead(embedding, tied=True, options=options)
    assert list(head.slots("head")) == []
    weight = fill(embedding.slots("embed"))["embed.weight"]
    embedding.finish()
    head.finish()
    assert torch.equal(embedding(torch.tensor([3, 0])), weight[[3, 0]])
    torch.testing.assert_close(head(random_input(2, 4)), random_input(2, 4) @ weight.T)


def test_head_of_its_own_gives_float32_logits() -> None:
    options = LayerOptions(dtype=torch.bfloat16)
    head = LMHead(Embedding(7, 4, options=options), tied=False, options=options)
    weight = fill(head.slots("head"))["head.weight"]
    logits = head(random_input(2, 4).bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (random_input(2, 4).bfloat16() @ weight.bfloat16().T).float())


@every_method
@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_the_greedy_token_is_the_largest_logits(options: LayerOptions, tied: bool) -> None:
    embedding = Embedding(70, 4, options=options)
    head = LMHead(embedding, tied=tied, options=options)
    fill(iter([*embedding.slots("embed"), *head.slots("head")]))
    embedding.finish()
    head.finish()
    hidden = random_input(5, 4)
    hidden[3, 1] = float("nan")
    logits = head(hidden)
    ids, best = head.greedy(hidden)
    good = [0, 1, 2, 4]
    assert ids[good].tolist() == logits[good].argmax(-1).tolist()
    assert best[good].tolist() == logits[good].amax(-1).tolist()
    assert best[3].isnan()


def test_a_tied_head_of_packed_weights_holds_nothing_of_its_own() -> None:
    options = LayerOptions(quant=Packed())
    embedding = Embedding(7, 4, options=options)
    head = LMHead(embedding, tied=True, options=options)
    fill(embedding.slots("embed"))
    embedding.finish()
    head.finish()
    assert head.parameters is embedding.parameters


def test_norm_adds_the_residual_in_place() -> None:
    norm = RMSNorm(8, 1e-5, options=OPTIONS)
    weight = fill(norm.slots("norm"))["norm.weight"]
    x, residual = random_input(3, 8), random_input(3, 8) * 2
    total = x + residual
    expected = total * (total.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(norm(total), expected)
    torch.testing.assert_close(norm.add(x, residual), expected)
    torch.testing.assert_close(residual, total)


@every_method
def test_gated_block_equals_its_formula(options: LayerOptions) -> None:
    mlp = GatedMLP(6, 10, bias=True, options=options)
    w = fill(mlp.slots("mlp."))
    mlp.finish()
    x = random_input(4, 6)
    gate = F.linear(x, w["mlp.gate_proj.weight"], w["mlp.gate_proj.bias"])
    up = F.linear(x, w["mlp.up_proj.weight"], w["mlp.up_proj.bias"])
    expected = F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"], w["mlp.down_proj.bias"])
    torch.testing.assert_close(mlp(x), expected)
