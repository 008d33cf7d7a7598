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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel
from octavo_engine.models.config import ModelConfig, token_ids
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.cut import Cut, CutRule, Keep, keep_all, read_whole
from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.digest import content_digest, sample_digest
from octavo_engine.weights.files import SafetensorsFiles, read_json
from octavo_engine.weights.gguf import TensorInfo, TensorType
from octavo_engine.weights.gguf_parts import GGUFParts
from octavo_engine.weights.locate import locate_model
from octavo_engine.weights.names import ROPE_FACTORS, hf_name, rotary_heads, rotary_row_order
from octavo_engine.weights.stacked import gguf_stack, hf_router, hf_stack
from octavo_engine.weights.stored import StoredTensor

if TYPE_CHECKING:
    import torch

    from octavo_engine.quant.schemes.base import Scheme
    from octavo_engine.weights.quantized import QuantizedTensor
    from octavo_engine.weights.quantized_files import QuantizedFiles

_SCHEME_FILES = MappingProxyType(
    {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
)
"""Where a checkpoint says how it is quantised if config.json does not, and by which method it then is."""


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
    def weights(
        self, cut: CutRule = read_whole, keep: Keep = keep_all
    ) -> Iterator[tuple[str, torch.Tensor | StoredTensor | QuantizedTensor]]:
        """Yield each weight once, as (Hugging Face name, tensor on the CPU), in the order of the file.

        Unquantised tensors keep the file's type, quantised ones come as their bytes. Either may share memory with the
        file's map: do not write to them. Tied weights come once.

        Args:
            cut: the parts that are wanted; nothing else is copied out of the file. Columns may be cut at multiples of
                `column_block`.
            keep: the tensors that are wanted; the others are not touched.

        Raises:
            CorruptModelFile: if a tensor cannot be read or has an impossible shape.
            UnsupportedModel: if the file holds a tensor that the architecture does not know.
        """

    @abstractmethod
    def num_bytes(self) -> Mapping[str, int]:
        """Return how many bytes each weight takes in the file, by the name that `weights` yields; none is read."""

    def column_block(self, name: str) -> int:  # noqa: ARG002
        """Return how many columns of a weight are stored as one, by its Hugging Face name; 1 if it is not quantised."""
        return 1

    @property
    def is_quantized(self) -> bool:
        """Whether linears come in the codes of a quantised checkpoint."""
        return False

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
    def files_read(self) -> list[Path]:
        """The files that hold weights, configuration and tokenizer."""

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for weights, configuration and tokenizer; see `content_digest` for what they promise."""
        return content_digest(self.files_read)

    @cached_property
    def sample(self) -> bytes:
        """32 bytes that stand for the same, made of a few of the files' bytes; see `sample_digest`."""
        return sample_digest(self.files_read)

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
        self._infos = dict(self._find_weights())
        self.num_weights = len(self._infos)

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

    def _find_weights(self) -> Iterator[tuple[str, TensorInfo]]:
        """Yield where each weight lies by its Hugging Face name, in the order of the file."""
        found: set[str] = set()
        for info in self.file.in_order:
            if info.name == ROPE_FACTORS:
                continue
            for name, part in self._weights_in(info):
                if name in found:
                    raise CorruptModelFile(f"{self.path}: tensor {info.name!r}: expected {name!r} once, found it twice")
                found.add(name)
                yield name, part

    def _weights_in(self, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the weights that a tensor holds: itself, or the matrices of all experts, each as if it stood alone."""
        num_experts = self.config.num_experts
        matrices = gguf_stack(info.name, num_experts)
        for matrix in matrices:
            rows = matrix.rows(info.name, info.shape, num_experts, str(self.path))
            num_rows, row_bytes = rows.stop - rows.start, info.num_bytes // (info.shape[0] * info.shape[1])
            first = matrix.place * info.shape[1] + rows.start
            yield (
                matrix.name,
                replace(
                    info,
                    shape=(num_rows, info.shape[2]),
                    offset=info.offset + first * row_bytes,
                    num_bytes=num_rows * row_bytes,
                ),
            )
        if matrices:
            return
        name = hf_name(info.name)
        if name is None:
            raise UnsupportedModel(f"{self.path}: tensor {info.name!r} is none of the llama architecture's")
        yield name, info

    def weights(
        self, cut: CutRule = read_whole, keep: Keep = keep_all
    ) -> Iterator[tuple[str, torch.Tensor | StoredTensor]]:
        for name, info in self._infos.items():
            if keep(name):
                yield name, self._tensor(info, cut(name))

    def num_bytes(self) -> Mapping[str, int]:
        return {name: info.num_bytes for name, info in self._infos.items()}

    def column_block(self, name: str) -> int:
        return self._infos[name].type.block_elements if name in self._infos else 1

    def _tensor(self, info: TensorInfo, cut: Cut | None = None) -> torch.Tensor | StoredTensor:
        import torch

        rows, shape = self._part(info, cut), info.shape if cut is None else cut.of(info.shape)
        dtypes = {
            TensorType.F32: torch.float32,
            TensorType.F16: torch.float16,
            TensorType.BF16: torch.bfloat16,
            TensorType.F64: torch.float64,
        }
        if info.type not in dtypes:
            return StoredTensor(rows, info.type, shape, f"{self.file.path_of(info.name)}: tensor {info.name!r}")
        return torch.from_numpy(rows.reshape(-1)).view(dtypes[info.type]).reshape(shape)

    def _part(self, info: TensorInfo, cut: Cut | None) -> Any:
        """Return the bytes of some rows or columns: [rows, bytes per row] uint8, contiguous."""
        if cut is None:
            return self._rows(info)
        cut.check(info.name, info.shape, str(self.path))
        if cut.axis == 0:
            return self._rows(info, cut.span)
        block, num_bytes = info.type.block_elements, info.type.block_bytes
        assert cut.start % block == cut.stop % block == 0, f"{info.name}: columns are cut inside a block of {block}"
        columns = slice(cut.start // block * num_bytes, cut.stop // block * num_bytes)
        return np.ascontiguousarray(self._rows(info)[:, columns])

    def _values(self, info: TensorInfo) -> Any:
        return dequantize(self._rows(info), info.type, info.shape)

    def _rows(self, info: TensorInfo, span: slice = slice(None)) -> Any:
        """Return a tensor's bytes with some or all rows in Hugging Face's order: [rows, bytes per row] uint8."""
        start = info.offset - self.file.tensors[info.name].offset  # above 0 in a stack
        data = self.file.raw(info.name)[start : start + info.num_bytes]
        rows = data.reshape(info.shape[0] if len(info.shape) > 1 else -1, self._row_bytes(info))
        num_heads = rotary_heads(info.name, self.config) if hf_name(info.name) else None
        if num_heads is None:
            return rows[span]
        if len(rows) != num_heads * self.config.head_dim:
            raise CorruptModelFile(
                f"{self.path}: tensor {info.name!r}: expected {num_heads * self.config.head_dim} rows "
                f"({num_heads} heads of {self.config.head_dim}), found shape {list(info.shape)}"
            )
        return rows[rotary_row_order(len(rows), num_heads)[span]]

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

    @property
    def files_read(self) -> list[Path]:
        return list(self.file.paths)


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
        self.scheme = self._read_scheme(config_path)
        self._linears = None if self.scheme is None else self._quantized(self.scheme)
        if self._linears is not None:
            self.num_weights = self._linears.num_weights
        else:
            self.num_weights = sum(len(hf_stack(name, self.config.num_experts)) or 1 for name in self.files.names)

    def _read_scheme(self, config_path: Path) -> Scheme | None:
        """Return how the linears are stored: by config.json, else by the file that some quantisers write beside it."""
        found = read_json(config_path).get("quantization_config")
        where = f"{config_path}: quantization_config"
        for name, method in _SCHEME_FILES.items():
            path = self.path / name
            if found is None and path.is_file():
                found, where = {"quant_method": method, **read_json(path)}, str(path)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise CorruptModelFile(f"{where}: expected an object, found {found!r}")
        from octavo_engine.quant.schemes.choose import choose_scheme  # needs torch

        return choose_scheme(found, where)

    def _quantized(self, scheme: Scheme) -> QuantizedFiles:
        from octavo_engine.weights.quantized_files import QuantizedFiles

        return QuantizedFiles(self.files, scheme)

    def weights(
        self, cut: CutRule = read_whole, keep: Keep = keep_all
    ) -> Iterator[tuple[str, torch.Tensor | StoredTensor | QuantizedTensor]]:
        if self._linears is not None:
            return self._linears.read(cut, keep)
        read = self.files.read(cut, keep, self.config.num_experts)
        return ((hf_router(name), weight) for name, weight in read)

    def column_block(self, name: str) -> int:
        return 1 if self._linears is None else self._linears.column_block(name)

    def num_bytes(self) -> Mapping[str, int]:
        if self._linears is not None:
            return self._linears.num_bytes()
        num_bytes: dict[str, int] = {}
        for name, count in self.files.num_bytes.items():
            matrices = hf_stack(name, self.config.num_experts)
            num_bytes |= {matrix.name: count // len(matrices) for matrix in matrices} or {hf_router(name): count}
        return num_bytes

    @property
    def is_quantized(self) -> bool:
        return self._linears is not None

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

    @property
    def files_read(self) -> list[Path]:
        names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", *_SCHEME_FILES)
        small = [self.path / name for name in names if (self.path / name).is_file()]
        return [*small, *self.files.paths]
