"""Transformers' model of the demo file: the oracle of tests that compare tokens."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo_engine.weights.locate import locate_model


@cache
def demo_oracle() -> Any:
    """Return it in float32 on the dequantised weights; reading the file takes Transformers many seconds, so once."""
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    path = Path(locate_model(None))
    assert path.suffix == ".gguf", "the tests want the demo model's GGUF file"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    return model.float().eval()
