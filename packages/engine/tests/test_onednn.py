import pytest

torch = pytest.importorskip("torch", reason="products need the extra [local]")

from octavo_engine.quant import onednn


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 65])
def test_the_packed_product_is_the_plain_one(num_rows: int, bias: bool):
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = torch.randn(num_rows, 96, generator=generator), torch.randn(130, 96, generator=generator)
    added = torch.randn(130, generator=generator) if bias else None
    assert onednn.can_pack(weight)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    with torch.inference_mode():
        product = onednn.linear(x, onednn.pack(weight), added)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


def test_other_dtypes_are_left_as_they_are():
    weight = torch.randn(4, 3, dtype=torch.bfloat16)
    assert not onednn.can_pack(weight)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    assert torch.equal(onednn.linear(x, weight, batch_invariant=False), torch.nn.functional.linear(x, weight))


def test_rows_are_filled_up_only_where_the_batch_must_not_show():
    x, weight = torch.randn(3, 96), torch.randn(50, 96)
    expected = torch.nn.functional.linear(x, weight)
    assert torch.equal(onednn.linear(x, weight, batch_invariant=False), expected)
    filled = torch.nn.functional.linear(torch.nn.functional.pad(x, (0, 0, 0, 29)), weight)[:3]
    assert torch.equal(onednn.linear(x, weight), filled)


def test_a_torch_without_the_operators_packs_nothing(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not onednn.can_pack(torch.randn(4, 3))


@pytest.mark.parametrize("form", ["packed", "plain", "bfloat16", "float16"])
@pytest.mark.parametrize(("in_features", "out_features"), [(96, 130), (576, 192), (64, 1)], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it_bit_for_bit(form: str, in_features: int, out_features: int):
    x, weight = operands(form, 65, in_features, out_features)
    with torch.inference_mode():
        alone = torch.cat([onednn.linear(row[None], weight) for row in x])
        for num_rows in range(1, 66):
            assert torch.equal(onednn.linear(x[:num_rows], weight), alone[:num_rows]), num_rows
            assert torch.equal(onednn.linear(x[-num_rows:], weight), alone[-num_rows:]), num_rows


@pytest.mark.parametrize("form", ["packed", "plain", "bfloat16", "float16"])
@pytest.mark.parametrize(("in_features", "out_features"), [(1536, 320), (1536, 576), (2048, 512)], ids=str)
def test_nor_does_a_row_of_a_prompt(form: str, in_features: int, out_features: int):
    x, weight = operands(form, 600, in_features, out_features)
    with torch.inference_mode():
        whole = onednn.linear(x, weight)
        for start, num_rows in ((0, 7), (0, 48), (100, 1), (37, 64), (300, 144), (72, 528)):
            part = slice(start, start + num_rows)
            assert torch.equal(onednn.linear(x[part], weight), whole[part]), (start, num_rows)


def operands(form: str, num_rows: int, in_features: int, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(rows, in_features, generator=generator) for rows in (num_rows, out_features))
    dtype = getattr(torch, form, torch.float32)
    return x.to(dtype), onednn.pack(weight) if form == "packed" else weight.to(dtype)
