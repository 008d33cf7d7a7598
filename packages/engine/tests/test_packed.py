import pytest

torch = pytest.importorskip("torch", reason="products need the extra [local]")

from octavo_engine.quant import packed


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 65])
def test_the_packed_product_is_the_plain_one(num_rows: int, bias: bool):
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = torch.randn(num_rows, 96, generator=generator), torch.randn(130, 96, generator=generator)
    added = torch.randn(130, generator=generator) if bias else None
    assert packed.can_pack(weight)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    with torch.inference_mode():
        product = packed.linear(x, packed.pack(weight), added)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


def test_other_dtypes_are_left_as_they_are():
    weight = torch.randn(4, 3, dtype=torch.bfloat16)
    assert not packed.can_pack(weight)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    assert torch.equal(packed.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_a_torch_without_the_operators_packs_nothing(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not packed.can_pack(torch.randn(4, 3))
