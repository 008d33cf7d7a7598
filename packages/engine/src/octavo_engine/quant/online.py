"""Online quantisation: the linears of a model that is not quantised become codes of 8 or 4 bits as they are read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from types import MappingProxyType

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile, UnsupportedModel
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.quantized import QuantizedTensor
from octavo_engine.weights.scaled_floats import ScaledFloats
from octavo_engine.weights.stored import StoredTensor

BLOCK = 32
_CHUNK_VALUES = 1 << 22
_MOST = 65504.0
_LARGEST_FP8 = 448.0
_Weight = Tensor | StoredTensor | QuantizedTensor


def quantize_online(
    weights: Iterable[tuple[str, _Weight]], linears: Container[str], kind: str, where: str
) -> Iterator[tuple[str, _Weight]]:
    """Yield a source's weights, those of linears as codes.

    Args:
        weights: (Hugging Face name, tensor) as a source yields them.
        linears: the names of those that are rounded; others, such as norms, embedding and head, pass as they are.
        kind: `int8`, GGUF's Q8_0, with a scale per block of 32 inputs; or `int4`, its Q4_1, with a scale and a least
            value. Both are made as ggml makes them, bit for bit. `fp8`: e4m3 with a scale per output in fp32, its
            largest weight over 448.
        where: what errors begin with.

    Raises:
        UnsupportedModel: if a linear is quantised already, or its inputs are not whole blocks of a kind that has these;
            names it.
        CorruptModelFile: if a linear has a value that is not finite, or in blocks one that fp16 does not hold; names
            it.
    """
    for name, weight in weights:
        if name not in linears:
            yield name, weight
        else:
            plain = _plain(name, weight, kind, where)
            yield name, _float8(name, plain, where) if kind == "fp8" else _blocks(name, plain, kind, where)


def _plain(name: str, weight: _Weight, kind: str, where: str) -> Tensor:
    if not isinstance(weight, Tensor):
        found = weight.type.name if isinstance(weight, StoredTensor) else type(weight).__name__
        raise UnsupportedModel(
            f"{where}: quantization {kind!r} takes weights that are not quantised, tensor {name!r} is ({found}); "
            "leave quantization out to run the model as it is stored"
        )
    return weight


def _float8(name: str, weight: Tensor, where: str) -> ScaledFloats:
    """Round the rows of a matrix to e4m3, each by a scale of its own."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty((len(weight), 1))
    step = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        values = weight[part].float()
        if not bool(values.isfinite().all()):
            raise CorruptModelFile(f"{where}: tensor {name!r}: expected finite numbers")
        scales[part] = values.abs().amax(dim=1, keepdim=True) / _LARGEST_FP8
        scaled = torch.where(scales[part] > 0, values / scales[part], 0.0)
        codes[part] = scaled.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(codes.dtype)  # a tiny scale is rounded itself
    rows, columns = weight.shape
    return ScaledFloats((rows, columns), codes, scales, (1, columns))


def _blocks(name: str, weight: Tensor, kind: str, where: str) -> StoredTensor:
    out_features, in_features = weight.shape
    if in_features % BLOCK:
        raise UnsupportedModel(
            f"{where}: quantization {kind!r} takes inputs in blocks of {BLOCK}, tensor {name!r} has {in_features}; "
            "leave quantization out"
        )
    tensor_type, make = _MAKERS[kind]
    row_bytes = in_features // BLOCK * tensor_type.block_bytes
    rows = torch.empty((out_features, row_bytes), dtype=torch.uint8)
    step = max(1, _CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        values = weight[start : start + step].float()
        if not bool((values.abs() <= _MOST).all()):
            raise CorruptModelFile(
                f"{where}: tensor {name!r}: expected numbers up to {_MOST:g} (fp16), found NaN or larger ones"
            )
        rows[start : start + step] = make(values.reshape(-1, BLOCK)).reshape(len(values), row_bytes)
    return StoredTensor(rows.numpy(), tensor_type, (out_features, in_features))


def _q8_0(blocks: Tensor) -> Tensor:
    """Return [num_blocks, 34] uint8 of [num_blocks, 32] fp32: halves round away from 0."""
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(scales)
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()
    return torch.cat([_bytes_of(scales), codes.to(torch.int8).view(torch.uint8)], dim=1)


def _q4_1(blocks: Tensor) -> Tensor:
    """Return [num_blocks, 20] uint8 of [num_blocks, 32] fp32: element i is packed with element i + 16."""
    least = blocks.amin(dim=1, keepdim=True)
    scales = (blocks.amax(dim=1, keepdim=True) - least) / 15
    codes = ((blocks - least) * _inverse(scales) + 0.5).clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, dim=1)
    return torch.cat([_bytes_of(scales), _bytes_of(least), low | (high << 4)], dim=1)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)


def _bytes_of(values: Tensor) -> Tensor:
    return values.half().contiguous().view(torch.uint8)


_Maker = tuple[TensorType, Callable[[Tensor], Tensor]]
_MAKERS: MappingProxyType[str, _Maker] = MappingProxyType(
    {"int8": (TensorType.Q8_0, _q8_0), "int4": (TensorType.Q4_1, _q4_1)}
)
