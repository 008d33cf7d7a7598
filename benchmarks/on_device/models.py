"""Models with random weights, made where they run: an engine's and, of the same sizes, Transformers'."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from octavo_engine import LLM
from octavo_engine.layers.options import LayerOptions
from octavo_engine.models.config import ModelConfig, RopeConfig
from octavo_engine.models.llama import Llama
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import Source


def llama_config(*, smoke: bool) -> ModelConfig:
    """Return the sizes of Llama-3.1-8B with a context of 4096 tokens, or some that compute at once."""
    sizes: dict[str, Any] = {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_layers": 32, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "max_position_embeddings": 4096,
    }  # fmt: skip
    if smoke:
        sizes = {
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "max_position_embeddings": 128,
        }  # fmt: skip
    return ModelConfig(
        architecture="LlamaForCausalLM", rms_norm_eps=1e-5, rope=RopeConfig(theta=500_000.0),
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False, sliding_window=None, bos_token_ids=(),
        eos_token_ids=(2,), hidden_act="silu", **sizes,
    )  # fmt: skip


class RandomSource(Source):
    """A model of some sizes whose weights are drawn on a device when they are asked for: no file of 16 GB."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.name = "random"
        self.path = Path(tempfile.mkdtemp(prefix="octavo-random-"))
        self.config = config
        self.generation_config = {}
        self._device = device
        self._slots = list(Llama(config, LayerOptions(device=torch.device("meta"))).slots())
        self.num_weights = len(self._slots)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        dtype = getattr(torch, self.config.dtype)
        for slot in self._slots:
            weight = torch.empty(slot.shape, dtype=dtype, device=self._device)
            yield slot.name, weight.fill_(1.0) if "norm" in slot.name else weight.normal_(0.0, 0.02)

    def num_bytes(self) -> dict[str, int]:
        itemsize = getattr(torch, self.config.dtype).itemsize
        return {slot.name: slot.num_parameters * itemsize for slot in self._slots}

    @property
    def files_read(self) -> list[Path]:
        return []

    @property
    def digest(self) -> bytes:
        return bytes(32)

    def _make_tokenizer(self) -> Tokenizer:
        """Make one of bytes, without merges, that knows a name for every other id too."""
        from tokenizers import Tokenizer as Built
        from tokenizers import decoders, models, pre_tokenizers

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: index for index, letter in enumerate(letters)}
        vocab |= {f"<{index}>": index for index in range(len(letters), self.config.vocab_size)}
        built = Built(models.BPE(vocab=vocab, merges=[]))
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        built.save(str(self.path / "tokenizer.json"))
        return Tokenizer.from_folder(self.path)

    def _template_source(self) -> str | None:
        return None


def make_llm(config: ModelConfig, device: torch.device, **options: Any) -> LLM:
    """Return an LLM of random weights; the engine opens the source that it is given instead of a file."""
    source = RandomSource(config, device)
    with mock.patch("octavo_engine.build.open_source", return_value=source):
        return LLM(None, show_progress=False, device=str(device), dtype=config.dtype, **options)


def make_transformers(config: ModelConfig, device: torch.device) -> Any:
    """Return Transformers' model of the same sizes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with device:
            return LlamaForCausalLM(sizes).eval()
    finally:
        torch.set_default_dtype(before)
