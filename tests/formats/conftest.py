"""Tiny models that others' libraries quantise and save, and what holds our reading of them against those libraries.

`nox -s formats` installs the libraries beside the shared environment; where one is missing its tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo_engine import LLM, SamplingParams
from octavo_engine.parallel import split
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.source import FolderSource

transformers = pytest.importorskip("transformers")

if os.environ.get("REQUIRE_FORMATS") == "1":
    missing = [
        name for name in ("awq", "bitsandbytes", "compressed_tensors", "torchao") if not importlib.util.find_spec(name)
    ]
    assert not missing, f"these libraries are not installed: {missing}"

SIZES = {"vocab_size": 131, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}

NUM_EXPERTS = 3
PROMPTS = ([3, 14, 15, 92, 65], [35, 89, 79], [1] * 20)
ROUNDING = 2e-4  # of log-probabilities: sums of float32 in another order


@dataclass(frozen=True)
class Checkpoint:
    """A folder that a library wrote, and what it means.

    `values` has by the linear's name its weight as the library dequantises it; `model` is Transformers' model in
    float32 before it was quantised.
    """

    folder: Path
    values: Mapping[str, Tensor]
    model: Any

    def check_values(self) -> None:
        """Hold every linear that is read against the library's, bit for bit in the dtype that it computes in."""
        weights = dict(FolderSource(self.folder).weights())
        quantised = {name for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}
        assert quantised == {f"{name}.weight" for name in self.values}
        for name, values in self.values.items():
            read = weights[f"{name}.weight"].values()
            assert read.dtype == torch.float32
            assert torch.equal(read.to(values.dtype), values), name

    def dequantised(self) -> Any:
        """Return the model with the library's values, as plain torch multiplies with them in float32.

        Where the library rounds them to 16 bits, it has ours, of which `check_values` says that they round to those.
        """
        read = dict(FolderSource(self.folder).weights())
        values = {
            name: values if values.dtype == torch.float32 else read[f"{name}.weight"].values()
            for name, values in self.values.items()
        }
        for name, weight in published(self.model):
            if (linear := values.get(name.removesuffix(".weight"))) is not None:
                weight.copy_(linear)
        return self.model

    def check_products(self, num_ranks: int = 1, **options: Any) -> None:
        """Hold log-probabilities of `LLM`, over some ranks, which are threads, against those of the model."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(split, "WorkerProcess", ThreadRank)
            options = {"tensor_parallel_size": num_ranks, "show_progress": False, "num_blocks": 32, **options}
            llm = LLM(str(self.folder), **options)
        with llm:
            given = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=4))
        model = self.dequantised()
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
            for position, found in enumerate(output.prompt_logprobs[1:]):
                pairs = [*found.top, (found.token_id, found.logprob)]
                assert len(pairs) == 5
                for token_id, logprob in pairs:
                    assert abs(logprob - float(expected[position, token_id])) < ROUNDING


def random_model(kind: str = "Llama", **sizes: int) -> Any:
    """Return a random Llama or Mixtral of Transformers, in float32."""
    torch.manual_seed(11)
    sizes = SIZES | ({"num_local_experts": NUM_EXPERTS} if kind == "Mixtral" else {}) | sizes
    config = getattr(transformers, f"{kind}Config")(**sizes, tie_word_embeddings=False)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def published(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights, a Mixtral's as it was published: experts one by one, as views of what they are in."""
    for name, weight in model.state_dict().items():
        layer, _, kind = name.partition("mlp.experts.")
        if not kind:
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), weight
            continue
        for expert, matrix in enumerate(weight):
            half = len(matrix) // 2
            parts = {"w1": matrix[:half], "w3": matrix[half:]} if "gate_up" in kind else {"w2": matrix}
            for part, rows in parts.items():
                yield f"{layer}block_sparse_moe.experts.{expert}.{part}.weight", rows


class Published(nn.Module):
    """The modules of a published Mixtral by their names, whose experts are linears, for libraries that look for those.

    Transformers stacks experts in one parameter, which none of the libraries quantises.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name, weight in published(model):
            *path, last, part = name.split(".")
            parent: nn.Module = self
            for step in path:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent._modules[step]
            module = nn.Module()
            if weight.dim() == 2:
                is_table = last == "embed_tokens"
                module = nn.Embedding(*weight.shape) if is_table else nn.Linear(*reversed(weight.shape), bias=False)
            module.register_parameter(part, nn.Parameter(weight.clone(), requires_grad=False))
            parent.add_module(last, module)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: SIZES["vocab_size"]]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


Save = Callable[[Any, Path], Mapping[str, Tensor]]


@pytest.fixture
def made_by(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Return a function that makes a checkpoint by a library.

    `save(model, folder)` quantises a Llama of Transformers, writes it, and returns what its linears mean; with
    `kind="Mixtral"` it is given `Published`, and the configuration as `model.config`.
    """

    def make(save: Save, kind: str = "Llama", dtype: torch.dtype = torch.float32, **sizes: int) -> Checkpoint:
        model = random_model(kind, **sizes).to(dtype)
        given = model
        if kind == "Mixtral":
            given = Published(model)
            given.config = model.config
            model.config.architectures = ["MixtralForCausalLM"]
            model.config.save_pretrained(tmp_path)
        values = {name: value.detach().clone() for name, value in save(given, tmp_path).items()}
        _write_tokenizer(tmp_path)
        return Checkpoint(tmp_path, values, random_model(kind, **sizes).to(dtype).float())

    return make
