"""LogitsBuffer: one memory on a CPU, and none elsewhere; a model that puts its logits there."""

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.quant.choose import has_native_products
from octavo_engine.runner.logits_buffer import LogitsBuffer
from octavo_engine.testing import random_model, tiny_config

CPU = torch.device("cpu")


def test_every_step_has_the_same_memory_on_a_cpu() -> None:
    buffer = LogitsBuffer(8, 100, CPU)
    first, second = buffer.rows(3), buffer.rows(8)
    assert first is not None
    assert second is not None
    assert (first.shape, second.shape, first.dtype) == ((3, 100), (8, 100), torch.float32)
    assert first.data_ptr() == second.data_ptr()


def test_other_devices_have_none() -> None:
    assert LogitsBuffer(8, 100, torch.device("meta")).rows(3) is None


def test_a_model_puts_its_logits_where_it_is_told_to() -> None:
    model = random_model(tiny_config())
    hidden = torch.randn(3, model.config.hidden_size)
    out = LogitsBuffer(4, model.config.vocab_size, CPU).rows(3)
    logits = model.logits(hidden, out=out)
    assert torch.equal(logits, model.logits(hidden))
    assert out is not None
    if has_native_products(CPU):
        assert logits.data_ptr() == out.data_ptr()
