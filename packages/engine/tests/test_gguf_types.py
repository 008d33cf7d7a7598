"""GGUF's types on the demo model: what stays packed generates what the expanded weights generate."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.models.llama import Llama
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.testing import Driver, make_runner
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource
from octavo_engine.weights.stored import StoredTensor

pytestmark = pytest.mark.model

TIE = 5e-4
NUM_TOKENS = 8
PROMPT = (504, 3575, 282, 4649, 314)
TYPES = [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q5_0, TensorType.Q5_1, TensorType.Q8_0, TensorType.MXFP4]
"""What the gguf package quantises and what divides every shape of the model."""


class Requantised:
    """The demo model with its matrices in another type; of a part of its layers, those alone, to save time."""

    def __init__(self, source: GGUFSource, tensor_type: TensorType, gguf: Any, num_layers: int) -> None:
        self.name = f"demo in {tensor_type.name}"
        self.config = replace(source.config, num_layers=num_layers)
        self.is_quantized = False
        self._weights = []
        oracle = gguf.GGMLQuantizationType(int(tensor_type))
        for name, tensor in source.weights():
            if ".layers." in name and int(name.split(".")[2]) >= num_layers:
                continue
            if isinstance(tensor, StoredTensor) and (".layers." in name or num_layers == source.config.num_layers):
                rows = gguf.quantize(tensor.values().numpy(), oracle)
                self._weights.append((name, StoredTensor(rows, tensor_type, tensor.shape)))
            else:
                self._weights.append((name, tensor))
        self.num_weights = len(self._weights)

    def weights(self) -> Iterator[tuple[str, Tensor | StoredTensor]]:
        return iter(self._weights)


def packed_tokens(source: Requantised) -> list[int]:
    """Return the greedy tokens of the model as it is stored."""
    model = load_model(source, quant=Packed())
    assert isinstance(model, Llama)
    driver = Driver(make_runner(model))
    driver.add(0, PROMPT)
    return driver.generate(NUM_TOKENS)[0]


def expanded_gaps(source: Requantised, tokens: list[int]) -> Tensor:
    """Return how far each token's logit lies below the largest one of the expanded model."""
    model = load_model(source, quant=Unquantized())
    assert isinstance(model, Llama)
    logits: list[Tensor] = []
    driver = Driver(make_runner(model, watch=lambda _, hidden: logits.append(model.logits(hidden))))
    driver.add(0, (*PROMPT, *tokens))
    driver.generate(1)
    of_tokens = logits[0][len(PROMPT) - 1 : -1]
    return of_tokens.amax(dim=-1) - of_tokens.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def check(source: GGUFSource, tensor_type: TensorType, num_layers: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package quantises")
    requantised = Requantised(source, tensor_type, gguf, num_layers)
    gaps = expanded_gaps(requantised, packed_tokens(requantised))
    assert gaps.max() <= TIE
    assert (gaps > 0).sum() <= 1


def test_the_models_first_layer_generates_as_the_expanded_one(demo_source: GGUFSource) -> None:
    check(demo_source, TensorType.Q5_0, num_layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_type", TYPES, ids=lambda item: item.name)
def test_the_model_in_every_type_generates_as_the_expanded_one(
    demo_source: GGUFSource, tensor_type: TensorType
) -> None:
    check(demo_source, tensor_type, num_layers=demo_source.config.num_layers)
