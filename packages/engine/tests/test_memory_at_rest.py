"""Memory at rest: every type of GGUF takes its bytes in the file; tests of other formats call `check_memory`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

from octavo_engine.models.llama import Llama
from octavo_engine.quant.packed import Packed
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource

NUM_TOKENS, HIDDEN_SIZE, KV_ROWS = 512, 256, 64
ROWS = {
    "token_embd": NUM_TOKENS,
    "blk.0.attn_q": HIDDEN_SIZE,
    "blk.0.attn_k": KV_ROWS,
    "blk.0.attn_v": KV_ROWS,
    "blk.0.attn_output": HIDDEN_SIZE,
    "blk.0.ffn_gate": HIDDEN_SIZE,
    "blk.0.ffn_up": HIDDEN_SIZE,
    "blk.0.ffn_down": HIDDEN_SIZE,
}
TYPES = [
    item for item in TensorType if item.name[0] != "I" or item.name.startswith("IQ")
]  # whole numbers are no weights
TYPES.remove(TensorType.F64)


@pytest.mark.parametrize("tensor_type", TYPES, ids=lambda item: item.name)
def test_every_type_takes_the_bytes_of_the_file_within_5_percent(
    make_gguf: Callable[..., Path], held_bytes: Callable[[object], int], tensor_type: TensorType
) -> None:
    """All matrices of the model in one type, the embedding and the head too; codes and finite scales at random."""
    rng = np.random.default_rng(0)
    row_bytes = HIDDEN_SIZE // tensor_type.block_elements * tensor_type.block_bytes
    tensors = {
        f"{name}.weight": (int(tensor_type), rng.integers(0, 256, (rows, row_bytes), dtype=np.uint8) & 0xBB)
        for name, rows in ROWS.items()
    }
    norm = (int(TensorType.F32), np.ones(HIDDEN_SIZE, np.float32).view(np.uint8))
    tensors |= dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"), norm)
    sizes = {"embedding_length": HIDDEN_SIZE, "feed_forward_length": HIDDEN_SIZE, "attention.head_count": 8}
    sizes |= {"attention.head_count_kv": 2, "vocab_size": NUM_TOKENS}
    keys = {f"llama.{name}": size for name, size in sizes.items()}
    keys["tokenizer.ggml.tokens"] = [f"<{index}>" for index in range(NUM_TOKENS)]
    keys["tokenizer.ggml.token_type"] = ["i32", [1] * NUM_TOKENS]
    model = load_model(GGUFSource(make_gguf(keys, tensors)), quant=Packed())
    assert isinstance(model, Llama)
    linears = [linear.parameters for layer in model.layers for _, linear in layer.linears("")]
    in_file = sum(ROWS.values()) * row_bytes
    assert 0.85 * in_file <= held_bytes([linears, model.embedding, model.head]) <= 1.05 * in_file
