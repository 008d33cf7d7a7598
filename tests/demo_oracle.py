"""Transformers' model of the demo file: the oracle of tests that compare tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from octavo_engine.weights.locate import locate_model


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Keep what Transformers reads of a GGUF file while it reads it.

    It asks the gguf package for all fields, a vocabulary among them, at each look at the file, and for the names of all
    tensors once for each of its modules: most of half a minute.
    """
    gguf = pytest.importorskip("gguf", reason="Transformers, the oracle, needs the gguf package to read GGUF")
    kept = {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **kept):
        yield


@cache
def demo_oracle() -> Any:
    """Return it in float32 on the dequantised weights; reading the file takes Transformers many seconds, so once."""
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    path = Path(locate_model(None))
    assert path.suffix == ".gguf", "the tests want the demo model's GGUF file"
    with gguf_read_once():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    return model.float().eval()
