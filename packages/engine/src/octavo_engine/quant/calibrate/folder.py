"""FolderWriter: writes a model's Hugging Face folder, its weights as they come, tokenizer and configuration besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo_engine.errors import InvalidConfig, UnsupportedModel
from octavo_engine.models.config import ModelConfig, RopeConfig
from octavo_engine.text.gguf_tokenizer import GGUFVocabulary, build
from octavo_engine.weights.files import read_json
from octavo_engine.weights.source import FolderSource, GGUFSource, Source

_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
_BYTES_OF_FILE = 4 << 30


def check_new(folder: Path) -> None:
    """Raise InvalidConfig if there is something where a model is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidConfig(f"{folder}: expected a new or an empty folder to write to; name another, or empty it")


class FolderWriter:
    """Writes weights in files of up to 4 GiB, so that no more than that has to be in memory.

    Args:
        folder: is made; it may be there if it is empty.

    Raises:
        InvalidConfig: if the folder has something in it.
    """

    def __init__(self, folder: Path, *, bytes_of_file: int = _BYTES_OF_FILE) -> None:
        check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._bytes_of_file = bytes_of_file
        self._held: dict[str, Tensor] = {}
        self._num_held = 0
        self._files: list[list[str]] = []
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a weight; it is written now or later, and must not be changed."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._held and self._num_held + num_bytes > self._bytes_of_file:
            self._write()
        self._held[name] = tensor
        self._num_held += num_bytes

    def finish(self) -> None:
        """Write what is held, and the index if there are several files."""
        self._write()
        total = len(self._files)
        names = {part: f"model-{part + 1:05}-of-{total:05}.safetensors" for part in range(total)}
        if total == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        for part, name in names.items():
            self._part(part).rename(self._folder / name)
        index = {
            "metadata": {"total_size": self._num_bytes},
            "weight_map": {weight: names[part] for part, weights in enumerate(self._files) for weight in weights},
        }
        _write_json(self._folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self._held, self._part(len(self._files)), {"format": "pt"})
        self._files.append(list(self._held))
        self._num_bytes += self._num_held
        self._held, self._num_held = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"


def describe(source: Source, quantization: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a source whose linears are stored as `quantization` says.

    Raises:
        UnsupportedModel: if a GGUF file's rotary factors have no form there.
    """
    own = isinstance(source, FolderSource)
    config = read_json(source.path / "config.json") if own else hf_config(source.config, source.name)
    return {**config, "quantization_config": quantization}


def write_description(source: Source, folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, the tokenizer and the chat template of a source, as Hugging Face's libraries read them."""
    if isinstance(source, GGUFSource):
        _write_tokenizer(source, folder)
    else:
        for name in _COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
    _write_json(folder / "config.json", config)


def hf_config(config: ModelConfig, name: str) -> dict[str, Any]:
    """Return what config.json says of a model's sizes and constants; `name` is for errors.

    Raises:
        UnsupportedModel: if its rotary factors have no form there.
    """
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope, name),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "hidden_act": config.hidden_act,
        "bos_token_id": next(iter(config.bos_token_ids), None),
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": "float16",
    }


def _rope_scaling(rope: RopeConfig, name: str) -> dict[str, Any] | None:
    if rope.kind == "factors":
        raise UnsupportedModel(
            f"{name}: its tensor 'rope_freqs.weight' has no form in config.json; quantise the model's own folder"
        )
    if rope.kind == "default":
        return None
    values = {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "attention_factor": rope.attention_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    return {key: value for key, value in values.items() if value is not None}


def _write_tokenizer(source: GGUFSource, folder: Path) -> None:
    """Write the tokenizer of a GGUF file's metadata as tokenizer.json, with what it says of decoding."""
    from tokenizers import decoders

    vocabulary = GGUFVocabulary.read(source.file.metadata, str(source.path))
    tokenizer = build(vocabulary)
    if vocabulary.model == "gpt2":
        tokenizer.decoder = decoders.ByteLevel()
    else:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(
            [*steps, decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else steps
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    template = source.file.metadata.get("tokenizer.chat_template")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **vocabulary.special_tokens,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.max_position_embeddings,
        "chat_template": template if isinstance(template, str) else None,
    }
    _write_json(folder / "tokenizer_config.json", {key: value for key, value in values.items() if value is not None})
    _write_json(folder / "generation_config.json", dict(source.generation_config))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
