"""The mixture of experts against its statement in float64, one expert and one token after the other."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.layers.experts import Experts, SeparateExperts, StackedExperts, make_experts
from octavo_engine.layers.mixture import MixtureOfExperts, Router
from octavo_engine.layers.options import LayerOptions
from octavo_engine.quant.base import WeightSlot
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.packed_on_device import PackedOnDevice
from octavo_engine.quant.unquantized import Unquantized

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 64, 96, 5, 2
PLAIN = LayerOptions(quant=Unquantized())
OPTIONS = {"unquantized": PLAIN, "packed": LayerOptions(quant=Packed())}
KINDS = {
    "one by one": (SeparateExperts, PLAIN),
    "one by one, packed": (SeparateExperts, OPTIONS["packed"]),
    "stacked": (StackedExperts, PLAIN),
}
NUM_TOKENS = [0, 17] if os.environ.get("TRITON_INTERPRET") == "1" else [0, 1, 2, 17]  # an interpreter takes its time
Kind = tuple[type[SeparateExperts | StackedExperts], LayerOptions]


def fill(slots: Iterator[WeightSlot], scale: float = 0.2) -> dict[str, Tensor]:
    """Fill slots with random values; return them by name."""
    generator = torch.Generator().manual_seed(1)
    weights = {slot.name: (slot, torch.randn(slot.shape, generator=generator) * scale) for slot in slots}
    for slot, values in weights.values():
        slot.fill(values)
    return {name: values for name, (_, values) in weights.items()}


def filled(kind: Kind, own: range = range(NUM_EXPERTS), device: str = "cpu") -> tuple[Experts, dict[str, Tensor]]:
    """Experts of which those outside `own` have the weights that the same seed gives all."""
    make, options = kind
    whole = StackedExperts(HIDDEN, INTERMEDIATE, range(NUM_EXPERTS), options=PLAIN)
    weights = fill(whole.slots(""))
    experts = make(HIDDEN, INTERMEDIATE, own, options=replace(options, device=torch.device(device)))
    for slot in experts.slots(""):
        slot.fill(weights[slot.name])
    experts.finish()
    return experts, weights


def choices(num_tokens: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and the weights and ids of their experts; the last expert gets none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator)
    weights, ids = scores.softmax(-1).topk(TOP_K)
    return x, weights / weights.sum(-1, keepdim=True), ids


def expected_sums(x: Tensor, weights: Tensor, ids: Tensor, matrices: dict[str, Tensor]) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up, down = (matrices[f"{expert}.{name}.weight"].double() for name in ("w1", "w3", "w2"))
            out[token] += weight * (down @ (F.silu(gate @ row) * (up @ row)))
    return out


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_experts_are_added_up_by_their_weights(kind: Kind, num_tokens: int, device: str) -> None:
    if device != "cpu" and isinstance(kind[1].quant, Packed):
        pytest.skip("a layout for CPUs")
    experts, matrices = filled(kind, device=device)
    x, weights, ids = choices(num_tokens)
    found = experts(x.to(device), weights.to(device), ids.to(device)).cpu()
    assert found.shape == x.shape
    torch.testing.assert_close(found.double(), expected_sums(x, weights, ids, matrices), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_parts_of_the_experts_add_up_to_all(kind: Kind) -> None:
    """Tokens whose experts are elsewhere get zeros, whether some or all of them are."""
    x, weights, ids = choices(9)
    whole, _ = filled(kind)
    parts = [filled(kind, own)[0](x, weights, ids) for own in (range(2), range(2, 4), range(4, 5))]
    torch.testing.assert_close(parts[0] + parts[1] + parts[2], whole(x, weights, ids), atol=1e-5, rtol=1e-5)
    assert not parts[2].any()
    assert all(
        part[(ids >= 2).all(-1) if first == 0 else (ids < 2).all(-1)].eq(0).all()
        for first, part in enumerate(parts[:2])
    )


@pytest.mark.filterwarnings("ignore:.*torch serves it, not the native library:octavo_kernels.BackendFallbackWarning")
@pytest.mark.skipif(os.environ.get("OCTAVO_BACKEND", "cpu") != "cpu", reason="only `cpu` promises it")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_company(options: LayerOptions, dtype: torch.dtype) -> None:
    """40 tokens at once, each by itself, in any order and in chunks."""
    if dtype != torch.float32:
        if isinstance(options.quant, Packed):
            pytest.skip("packed products are for float32")
        options = LayerOptions(dtype, quant=Unquantized())
    mixture = MixtureOfExperts(320, 160, num_experts=NUM_EXPERTS, top_k=3, options=options)
    fill(mixture.slots(""))
    mixture.finish()
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(5)).to(dtype)
    together = mixture(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    assert torch.equal(mixture(x[order]), together[order])
    for length in (1, 7, 33):
        assert torch.equal(torch.cat([mixture(part) for part in x.split(length)]), together), length


def test_the_router_takes_the_likeliest_and_shares_their_probability() -> None:
    router = Router(HIDDEN, NUM_EXPERTS, TOP_K, options=PLAIN)
    gate = fill(router.linear.slots(""))["gate.weight"]
    x, _, _ = choices(11)
    weights, ids = router(x)
    probabilities = (x.double() @ gate.double().T).softmax(-1)
    likeliest, expected_ids = probabilities.sort(-1, descending=True)
    assert torch.equal(ids, expected_ids[:, :TOP_K])
    likeliest = likeliest[:, :TOP_K]
    torch.testing.assert_close(weights.double(), likeliest / likeliest.sum(-1, keepdim=True), atol=1e-6, rtol=1e-6)


def test_the_load_counts_every_token_of_every_expert() -> None:
    mixture = MixtureOfExperts(HIDDEN, INTERMEDIATE, num_experts=NUM_EXPERTS, top_k=TOP_K, own=range(2), options=PLAIN)
    fill(mixture.slots(""))
    mixture.finish()
    expected = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    for seed in range(3):
        x, _, _ = choices(20, seed)
        mixture(x)
        expected += mixture.router(x)[1].flatten().bincount(minlength=NUM_EXPERTS)
    assert torch.equal(mixture.load.num_tokens, expected)
    assert int(expected.sum()) == 3 * 20 * TOP_K
    mixture.load.clear()
    assert not mixture.load.num_tokens.any()


def test_the_kernel_for_mixtures_serves_where_there_is_one(device: str) -> None:
    """Weights in another form than rows of numbers are each multiplied by themselves everywhere."""
    has_kernel = device != "cpu" or os.environ.get("OCTAVO_BACKEND") == "triton"
    expected = StackedExperts if has_kernel else SeparateExperts
    for options in (PLAIN, LayerOptions(quant=PackedOnDevice())):
        options = replace(options, device=torch.device(device))
        assert isinstance(make_experts(HIDDEN, INTERMEDIATE, range(2), options=options), expected)
    assert isinstance(make_experts(HIDDEN, INTERMEDIATE, range(2), options=OPTIONS["packed"]), SeparateExperts)
