"""Source: one model on disk, whether a GGUF file or a Hugging Face folder: configuration, weights, tokenizer, template.

Opening a source reads headers and small files only. The weights stream out of memory maps under Hugging Face's names,
each once; torch is imported there and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel
from octavo_engine.models.config import ModelConfig, token_ids
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.digest import content_digest
from octavo_engine.weights.files import SafetensorsFiles, read_json
from octavo_engine.weights.gguf import TensorInfo, TensorType
from octavo_engine.weights.gguf_parts import GGUFParts
from octavo_engine.weights.locate import locate_model
from octavo_engine.weights.names import ROPE_FACTORS, hf_name, rotary_heads, rotary_row_order
from octavo_engine.weights.stored import StoredTensor

if TYPE_CHECKING:
    import torch


class Source(ABC):
    """What every kind of model source gives.

    `name` is for people, `path` is the file or folder, `config` the sizes, `generation_config` what the model's authors
    advise for sampling (as in generation_config.json; may be empty), `num_weights` how many tensors `weights` yields.
    """

    name: str
    path: Path
    config: ModelConfig
    generation_config: Mapping[str, Any]
    num_weights: int

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, torch.Tensor | StoredTensor]]:
        """Yield each weight once, as (Hugging Face name, tensor on the CPU), in the order of the file.

        Unquantised tensors keep the file's type, quantised ones come as their bytes. Either may share memory with the
        file's map: do not write to them. Tied weights come once.

        Raises:
            CorruptModelFile: if a tensor cannot be read or has an impossible shape.
            UnsupportedModel: if the file holds a tensor that the architecture does not know.
        """

    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer; built on first use, then the same object.

        Raises:
            ModelNotFound: if the model comes without one.
            CorruptModelFile: if its files cannot be parsed.
            UnsupportedModel: if it is of a kind that we do not know.
        """
        return self._tokenizer

    def chat_template(self) -> ChatTemplate | None:
        """Return what turns messages into a prompt, or None if the model has no template.

        Raises:
            CorruptModelFile: if the template has a syntax error.
        """
        source = self._template_source()
        return None if source is None else ChatTemplate(source, self._tokenizer.special_tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._make_tokenizer()

    @abstractmethod
    def _make_tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def _template_source(self) -> str | None: ...

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """32 bytes that stand for weights, configuration and tokenizer; see `content_digest` for what they promise."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a generation: the configuration's, then the tokenizer's own."""
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *self._tokenizer.eos_token_ids)))


def open_source(model: str | Path | None = None) -> Source:
    """Open a model.

    Args:
        model: A .gguf file, a folder with config.json and safetensors files, a hub id like `org/name`, or None for the
            demo model.

    Raises:
        ModelNotFound: if there is no such model; says what to do.
        CorruptModelFile: if its files are damaged.
        UnsupportedModel: if they are sound but of a kind that we cannot run.
    """
    path = locate_model(model)
    name = str(model) if model is not None and not Path(model).exists() else path.stem if path.is_file() else path.name
    return FolderSource(path, name) if path.is_dir() else GGUFSource(path, name)


class GGUFSource(Source):
    """A model in one GGUF file, or in several parts of one."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.stem
        self.file = GGUFParts(path)
        self.config = self._read_config()
        eos = list(self.config.eos_token_ids)
        self.generation_config = {"eos_token_id": eos} if eos else {}
        self._names = self._map_names()
        self.num_weights = len(self._names)

    def _read_config(self) -> ModelConfig:
        tensors = self.file.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise CorruptModelFile(f"{self.path}: expected a tensor 'token_embd.weight', found none")
        factors = None
        if ROPE_FACTORS in tensors:
            factors = tuple(self._values(tensors[ROPE_FACTORS]).ravel().tolist())
        config = ModelConfig.from_gguf(
            self.file.metadata, tensors, str(self.path), vocab_size=embedding.shape[0], freq_factors=factors
        )
        if embedding.shape != (config.vocab_size, config.hidden_size):
            raise CorruptModelFile(
                f"{self.path}: tensor 'token_embd.weight': expected {config.hidden_size} columns, "
                f"found shape {list(embedding.shape)}"
            )
        return config

    def _map_names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for gguf_name in self.file.tensors:
            name = hf_name(gguf_name)
            if name is not None:
                names[gguf_name] = name
            elif gguf_name != ROPE_FACTORS:
                raise UnsupportedModel(f"{self.path}: tensor {gguf_name!r} is none of the llama architecture's")
        return names

    def weights(self) -> Iterator[tuple[str, torch.Tensor | StoredTensor]]:
        for info in self.file.in_order:
            if info.name in self._names:
                yield self._names[info.name], self._tensor(info)

    def _tensor(self, info: TensorInfo) -> torch.Tensor | StoredTensor:
        import torch

        dtypes = {
            TensorType.F32: torch.float32,
            TensorType.F16: torch.float16,
            TensorType.BF16: torch.bfloat16,
            TensorType.F64: torch.float64,
        }
        if info.type not in dtypes:
            return StoredTensor(self._rows(info), info.type, info.shape)
        return torch.from_numpy(self._rows(info).reshape(-1)).view(dtypes[info.type]).reshape(info.shape)

    def _values(self, info: TensorInfo) -> Any:
        return dequantize(self._rows(info), info.type, info.shape)

    def _rows(self, info: TensorInfo) -> Any:
        """Return a tensor's bytes with its rows in Hugging Face's order: [shape[0], bytes per row] uint8."""
        rows = self.file.raw(info.name).reshape(info.shape[0] if len(info.shape) > 1 else -1, self._row_bytes(info))
        num_heads = rotary_heads(info.name, self.config) if hf_name(info.name) else None
        if num_heads is None:
            return rows
        if len(rows) != num_heads * self.config.head_dim:
            raise CorruptModelFile(
                f"{self.path}: tensor {info.name!r}: expected {num_heads * self.config.head_dim} rows "
                f"({num_heads} heads of {self.config.head_dim}), found shape {list(info.shape)}"
            )
        return rows[rotary_row_order(len(rows), num_heads)]

    @staticmethod
    def _row_bytes(info: TensorInfo) -> int:
        if len(info.shape) > 1:
            return info.num_bytes // info.shape[0]
        return info.type.block_bytes

    def _make_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.file.metadata, str(self.path))

    def _template_source(self) -> str | None:
        template = self.file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def digest(self) -> bytes:
        return content_digest(self.file.paths)


class FolderSource(Source):
    """A model in a Hugging Face folder: config.json, safetensors files, tokenizer files."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        config_path = path / "config.json"
        if not config_path.is_file():
            raise ModelNotFound(f"{path}: expected config.json and *.safetensors in this folder, found no config.json")
        config = ModelConfig.from_hf(read_json(config_path), str(config_path))
        generation_path = path / "generation_config.json"
        self.generation_config = read_json(generation_path) if generation_path.is_file() else {}
        advised = token_ids(self.generation_config.get("eos_token_id"), f"{generation_path}: eos_token_id")
        self.config = replace(config, eos_token_ids=tuple(dict.fromkeys((*advised, *config.eos_token_ids))))
        self.files = SafetensorsFiles(path)
        self.num_weights = self.files.num_weights

    def weights(self) -> Iterator[tuple[str, torch.Tensor | StoredTensor]]:
        return iter(self.files)

    def _make_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)

    def _template_source(self) -> str | None:
        """From chat_template.jinja, else from tokenizer_config.json (a string, or a list that has a `default`)."""
        separate = self.path / "chat_template.jinja"
        if separate.is_file():
            try:
                return separate.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CorruptModelFile(f"{separate}: expected UTF-8 text: {error.reason}") from error
        path = self.path / "tokenizer_config.json"
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if template is not None and not isinstance(template, str):
            raise CorruptModelFile(f"{path}: chat_template: expected a string, found {type(template).__name__}")
        return template

    @cached_property
    def digest(self) -> bytes:
        names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        small = [self.path / name for name in names if (self.path / name).is_file()]
        return content_digest([*small, *self.files.paths])
