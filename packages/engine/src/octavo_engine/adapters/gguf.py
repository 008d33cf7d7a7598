"""read_gguf: reads an adapter from a GGUF file, as llama.cpp's converter writes it, and checks it against the model.

Of a tensor NAME of the base there are `NAME.lora_a` [rank, in_features] and `NAME.lora_b` [out_features, rank], in any
of GGUF's types. The product is scaled by `adapter.lora.alpha` over the rank; an alpha of 0 stands for a scale of 1.
"""

from __future__ import annotations

from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo_engine.adapters.info import AdapterTarget, Targets
from octavo_engine.adapters.weights import AdapterWeights, LowRank
from octavo_engine.errors import CorruptModelFile, InvalidAdapter, ModelNotFound, UnsupportedModel
from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.gguf import GGUFFile
from octavo_engine.weights.names import hf_name, rotary_heads, rotary_row_order

if TYPE_CHECKING:
    from octavo_engine.models.config import ModelConfig

_ALPHA = "adapter.lora.alpha"
_EXPECTED = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
_REFUSED = "adapter.alora.invocation_tokens"
_DIGEST_BYTES = 32
_MATRICES = ("lora_a", "lora_b")


class _Pair(NamedTuple):
    """What a file has for one linear of the model: the base tensor's name in GGUF, and the linear's sizes."""

    base: str
    target: AdapterTarget


def read_gguf(
    path: Path, targets: Targets, config: ModelConfig, *, max_rank: int, dtype: torch.dtype
) -> AdapterWeights:
    """Read a GGUF file with an adapter.

    The digest is of the numbers that the weights were made of, so that a file which changes meanwhile cannot make it
    lie.

    Args:
        path: the file.
        targets: the model's linears.
        config: the model's, for the order in which GGUF has the rows of rotary projections.
        max_rank: the highest rank that is served.
        dtype: of the matrices that are returned.

    Raises:
        InvalidAdapter: the file is missing or damaged, or holds something else than an adapter of this architecture; a
            tensor is missing, unknown, of another shape, or not finite; a rank is too high. Says which, and what was
            expected.
    """
    try:
        file = GGUFFile(path)
    except (CorruptModelFile, ModelNotFound, UnsupportedModel) as error:
        raise InvalidAdapter(str(error)) from error
    alpha = _check_metadata(file)
    digest = blake2b(b"gguf adapter %r" % alpha, digest_size=_DIGEST_BYTES)
    modules = {}
    for module, pair in sorted(_pairs(file, targets).items()):
        a, b = (_read(file, f"{pair.base}.{kind}", digest) for kind in _MATRICES)
        _check_shapes(path, pair, a, b, max_rank)
        rank, num_heads = len(a), rotary_heads(pair.base, config)
        if num_heads is not None:
            b = b[torch.from_numpy(rotary_row_order(len(b), num_heads))]
        modules[module] = LowRank(a.to(dtype), b.to(dtype), alpha / rank if alpha else 1.0)
    return AdapterWeights(digest=digest.digest(), modules=modules)


def _check_metadata(file: GGUFFile) -> float:
    """Check what kind of file it is, and return alpha."""
    for key, expected in _EXPECTED.items():
        if (found := file.metadata.get(key)) != expected:
            raise InvalidAdapter(f"{file.path}: metadata key {key!r}: expected {expected!r}, found {found!r:.80}")
    if _REFUSED in file.metadata:
        raise InvalidAdapter(
            f"{file.path}: metadata key {_REFUSED!r}: expected none, for an adapter that begins at certain tokens is "
            "not served"
        )
    alpha = file.metadata.get(_ALPHA)
    if not isinstance(alpha, float) or not isfinite(alpha) or alpha < 0:
        raise InvalidAdapter(f"{file.path}: metadata key {_ALPHA!r}: expected a number from 0 on, found {alpha!r:.80}")
    return alpha


def _pairs(file: GGUFFile, targets: Targets) -> dict[str, _Pair]:
    """Return what there is for each linear; refuse tensors that are nothing of the model's, and halves of pairs."""
    pairs: dict[str, _Pair] = {}
    for name in file.tensors:
        base, _, kind = name.rpartition(".")
        if kind not in _MATRICES:
            raise InvalidAdapter(f"{file.path}: tensor {name!r} is of a kind that is not served; lora_a and lora_b are")
        module = (hf_name(base) or base).removesuffix(".weight")
        if module not in targets:
            raise InvalidAdapter(
                f"{file.path}: tensor {name!r} is for {base!r}, which is none of the model's linears that are adapted"
            )
        for other in _MATRICES:
            if f"{base}.{other}" not in file.tensors:
                raise InvalidAdapter(
                    f"{file.path}: expected a tensor {f'{base}.{other}'!r} beside {name!r}, found none"
                )
        pairs[module] = _Pair(base, targets[module])
    if not pairs:
        raise InvalidAdapter(f"{file.path}: expected LoRA matrices, found no tensors")
    return pairs


def _read(file: GGUFFile, name: str, digest: blake2b) -> Tensor:
    """Return a tensor's values in float32, made of the bytes that go into the digest."""
    info = file.tensors[name]
    raw = np.array(file.raw(name))  # a copy: the file may change under its map
    digest.update(f"{name} {info.type.name} {info.shape} ".encode())
    digest.update(raw.data)
    values = torch.from_numpy(dequantize(raw, info.type, info.shape))
    if not values.isfinite().all():
        raise InvalidAdapter(f"{file.path}: tensor {name!r}: expected finite numbers, found NaN or infinity")
    return values


def _check_shapes(path: Path, pair: _Pair, a: Tensor, b: Tensor, max_rank: int) -> None:
    rank = a.shape[0]
    expected = ((rank, pair.target.in_features), (pair.target.out_features, rank))
    for kind, tensor, shape in zip(_MATRICES, (a, b), expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise InvalidAdapter(
                f"{path}: tensor {f'{pair.base}.{kind}'!r}: expected shape {list(shape)}, by the rank of lora_a and "
                f"the sizes of this model, found {list(tensor.shape)}; the adapter may be of another model"
            )
    if rank > max_rank:
        raise InvalidAdapter(
            f"{path}: {pair.base!r} has rank {rank}, at most {max_rank} is served; raise max_lora_rank, which takes "
            "memory for each adapter in proportion"
        )
