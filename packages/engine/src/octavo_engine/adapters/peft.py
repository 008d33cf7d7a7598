"""read_peft: reads an adapter from a folder in the layout of PEFT, and checks it against the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo_engine.adapters.info import Targets
from octavo_engine.adapters.peft_config import PeftConfig
from octavo_engine.adapters.weights import AdapterWeights, LowRank
from octavo_engine.errors import InvalidAdapter

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?:(?P<matrix>lora_[AB])\.(?P<part>weight|bias)|(?:base_layer\.)?bias"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_SAVED = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
_PREFIX = "base_model.model."
_DIGEST_BYTES = 32
_SHOWN = 3


@dataclass(slots=True)
class _Parts:
    """The tensors of a file, by kind and module."""

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    extra_biases: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)


def read_peft(
    folder: Path,
    targets: Targets,
    *,
    max_rank: int,
    dtype: torch.dtype,
    ends_shape: tuple[int, int] | None = None,
) -> AdapterWeights:
    """Read adapter_config.json and adapter_model.safetensors.

    The digest is of the bytes that the weights were made of, so that files which change meanwhile cannot make it lie.

    Args:
        folder: where they are.
        targets: the model's linears.
        max_rank: the highest rank that is served.
        dtype: of the matrices that are returned, but for an embedding and a head, which stay as they are stored.
        ends_shape: of the model's embedding and head; None where no others can take their places.

    Raises:
        InvalidAdapter: a file is missing or damaged; a tensor is missing, unknown, of another shape, or not finite; a
            rank is too high; the adapter is of a kind that is not served. Says which, and what was expected.
    """
    config_bytes, weight_bytes = _read(folder / _CONFIG), _read(folder / _WEIGHTS)
    config = PeftConfig.parse(_parse_json(config_bytes, folder / _CONFIG), str(folder / _CONFIG))
    where = str(folder / _WEIGHTS)
    parts = _sort(_load(weight_bytes, where), targets, where)
    _check_missing(config, parts, targets, where)
    _check_saved(config, parts.saved, ends_shape, where)
    for name in parts.a:
        _check_shapes(config, name, parts, targets, max_rank, where)
    magnitudes = _vectors("magnitude", parts.magnitudes, targets, where)
    modules = {
        name: LowRank(a.to(dtype), parts.b[name].to(dtype), config.scale_of(name), magnitudes.get(name))
        for name, a in parts.a.items()
    }
    digest = blake2b(len(config_bytes).to_bytes(8, "little") + config_bytes, digest_size=_DIGEST_BYTES)
    digest.update(weight_bytes)
    return AdapterWeights(
        digest=digest.digest(),
        modules=modules,
        biases=_vectors("bias", parts.biases, targets, where),
        extra_biases={
            name: bias * config.scale_of(name)
            for name, bias in _vectors("bias", parts.extra_biases, targets, where).items()
        },
        embedding=parts.saved.get("embedding"),
        head=parts.saved.get("head"),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if path.name == _WEIGHTS and (path.parent / _PICKLED).is_file():
            raise InvalidAdapter(
                f"{path.parent}: expected {_WEIGHTS}, found {_PICKLED}, which is a pickle and could run any code; save "
                "the adapter again with safetensors"
            ) from error
        raise InvalidAdapter(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse_json(text: bytes, path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{path}: expected JSON: {error}") from error
    if not isinstance(settings, dict):
        raise InvalidAdapter(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def _load(data: bytes, where: str) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: Mapping[str, Tensor] = load(data)
    except SafetensorError as error:
        raise InvalidAdapter(f"{where}: {error}; save or download the file again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InvalidAdapter(f"{where}: tensor {name!r}: expected a floating dtype, found {tensor.dtype}")
        if not tensor.isfinite().all():
            raise InvalidAdapter(f"{where}: tensor {name!r}: expected finite numbers, found NaN or infinity")
    return tensors


def _sort(tensors: Mapping[str, Tensor], targets: Targets, where: str) -> _Parts:
    """Sort tensors by what they are; refuse those that are nothing of the model's."""
    parts = _Parts()
    for name, tensor in tensors.items():
        if (kind := _SAVED.get(name.removeprefix(_PREFIX))) is not None:
            parts.saved[kind] = tensor
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidAdapter(
                f"{where}: tensor {name!r} is of a kind that is not served; LoRA matrices and biases are"
            )
        module = match["module"]
        if module not in targets:
            raise InvalidAdapter(
                f"{where}: tensor {name!r} is for a linear {module!r}, which the model does not have; it has "
                f"{_shown(targets)}"
            )
        if match["magnitude"] is not None:
            parts.magnitudes[module] = tensor
        elif match["matrix"] is None:
            if not targets[module].has_bias:
                raise InvalidAdapter(f"{where}: tensor {name!r} replaces a bias of {module!r}, which the model lacks")
            parts.biases[module] = tensor
        elif match["part"] == "bias":
            if match["matrix"] == "lora_A":
                raise InvalidAdapter(f"{where}: tensor {name!r}: expected no bias of an A")
            parts.extra_biases[module] = tensor
        else:
            (parts.a if match["matrix"] == "lora_A" else parts.b)[module] = tensor
    return parts


def _check_missing(config: PeftConfig, parts: _Parts, targets: Targets, where: str) -> None:
    """Check that there are both matrices of whatever has one, and of all that is named, and where magnitudes are."""
    wanted = {name for name in targets if config.targets(name)} | parts.a.keys() | parts.b.keys()
    for kind, found in (("lora_A", parts.a), ("lora_B", parts.b)):
        if missing := sorted(wanted - found.keys()):
            raise InvalidAdapter(f"{where}: expected {kind} of {_shown(missing)}, found none")
    if not wanted:
        raise InvalidAdapter(f"{where}: expected LoRA matrices, found none")
    if config.use_dora and (missing := sorted(wanted - parts.magnitudes.keys())):
        raise InvalidAdapter(f"{where}: expected lora_magnitude_vector of {_shown(missing)}, found none")
    if others := sorted(parts.magnitudes.keys() - (wanted if config.use_dora else set())):
        raise InvalidAdapter(
            f"{where}: expected no lora_magnitude_vector of {_shown(others)}: there is one only with use_dora in "
            f"{_CONFIG}, beside lora_A and lora_B"
        )


def _check_saved(config: PeftConfig, saved: Mapping[str, Tensor], expected: tuple[int, int] | None, where: str) -> None:
    """Check that there are the embedding and the head that are named, and no others, in the model's shape."""
    named = {
        kind for kind, is_named in (("embedding", config.saves_embedding), ("head", config.saves_head)) if is_named
    }
    if named and expected is None:
        raise InvalidAdapter(
            f"{config.where}: modules_to_save: expected it unset, found the {' and the '.join(sorted(named))}: a model "
            "that is split over several processes serves none; leave out tensor_parallel_size"
        )
    if missing := sorted(named - saved.keys()):
        raise InvalidAdapter(f"{where}: expected the {missing[0]} that modules_to_save of {_CONFIG} names, found none")
    if config.saves_embedding and config.ties_head:
        named.add("head")
    if others := sorted(saved.keys() - named):
        raise InvalidAdapter(
            f"{where}: expected no {others[0]}, which modules_to_save of {_CONFIG} does not name; if the vocabulary "
            "was resized, merge the adapter into its base and serve the result"
        )
    for kind, tensor in saved.items():
        if tuple(tensor.shape) != expected:
            raise InvalidAdapter(
                f"{where}: {kind}: expected shape {list(expected or ())}, that of the base model, found "
                f"{list(tensor.shape)}; if the vocabulary was resized, merge the adapter into its base and serve the "
                "result"
            )


def _check_shapes(config: PeftConfig, name: str, parts: _Parts, targets: Targets, max_rank: int, where: str) -> None:
    """Check the shapes of a linear's matrices, and their rank."""
    target, rank = targets[name], config.rank_of(name)
    for kind, tensor, expected in (
        ("lora_A", parts.a[name], (rank, target.in_features)),
        ("lora_B", parts.b[name], (target.out_features, rank)),
    ):
        if tuple(tensor.shape) != expected:
            raise InvalidAdapter(
                f"{where}: {kind} of {name!r}: expected shape {list(expected)}, the rank by {_CONFIG} and the sizes of "
                f"this model, found {list(tensor.shape)}; the adapter may be of another model"
            )
    if rank > max_rank:
        raise InvalidAdapter(
            f"{where}: {name!r} has rank {rank}, at most {max_rank} is served; raise max_lora_rank, which takes memory "
            "for each adapter in proportion"
        )


def _vectors(kind: str, vectors: Mapping[str, Tensor], targets: Targets, where: str) -> dict[str, Tensor]:
    """Check vectors with a number per output and return them in float32."""
    for name, vector in vectors.items():
        if tuple(vector.shape) != (targets[name].out_features,):
            raise InvalidAdapter(
                f"{where}: {kind} of {name!r}: expected shape {[targets[name].out_features]}, found "
                f"{list(vector.shape)}"
            )
    return {name: vector.float() for name, vector in vectors.items()}


def _shown(names: Iterable[str]) -> str:
    """Name the first of several."""
    every = list(names)
    others = f" and {len(every) - _SHOWN} others" if len(every) > _SHOWN else ""
    return ", ".join(map(repr, every[:_SHOWN])) + others
