"""KVScales: the factors that a checkpoint has for an 8-bit KV cache, one for a layer or one for each of its heads.

Tensors are told by their names, as compressed-tensors, ModelOpt and FP8 checkpoints have them, for keys and alike for
values (v for k)::

    <layer>.self_attn.k_scale         compressed-tensors, FP8; one number, or one for each KV head
    <layer>.self_attn.attn.k_scale    vLLM's own name of the same
    <layer>.self_attn.k_proj.k_scale  ModelOpt
    <layer>.self_attn.k_proj.output_scale  earlier compressed-tensors

A cached element is `scale * code`. The checkpoint says whether its codes are FP8 (e4m3, up to 448) or int8 (up to 127);
in a cache of the other form scales are stretched, so that the largest code stands for the same value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile
from octavo_engine.kv_dtype import dtype_name
from octavo_engine.models.llama import Llama
from octavo_engine.models.registry import Model
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource, Source
from octavo_kvcache import KVCacheSpec
from octavo_kvcache.storage import KVStorage

_NAME = re.compile(r"\.layers\.(\d+)\.self_attn\.(?:(?:attn\.)?([kv])_scale|([kv])_proj\.(?:output_scale|[kv]_scale))$")
_LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SCHEME_FILE = "hf_quant_config.json"


class KVScales(NamedTuple):
    """Factors of a layer's cached keys and values, [num_kv_heads] fp32 each; shared by all tokens."""

    k: Tensor
    v: Tensor


def load_with_scales(source: Source, *, kv_dtype: torch.dtype, **options: Any) -> Model:
    """Load a model as `load_model` does; over a KV cache of codes it follows the scales that the checkpoint has.

    Args:
        source: the configuration and the weights.
        kv_dtype: of the KV cache.
        options: as `load_model` takes them.

    Raises:
        CorruptModelFile: a scale is missing, of another shape or no finite number above 0; names it.
        UnsupportedModel: as `load_model`.
    """
    model = load_model(source, **options)
    if isinstance(model, Llama):
        for index, scales in read_scales(source, kv_dtype).items():
            model.layers[index].attention.follow(scales.k, scales.v)
    return model


def read_scales(source: Source, kv_dtype: torch.dtype) -> dict[int, KVScales]:
    """Return the scales of each layer for a KV cache of a dtype; none where it needs none or the source has none.

    Raises:
        CorruptModelFile: a scale is missing, of another shape or no finite number above 0; names it.
    """
    if not isinstance(source, FolderSource) or not KVCacheSpec(1, 1, dtype_name(kv_dtype)).has_scales:
        return {}
    names: dict[tuple[int, str], str] = {}
    for name in source.files.names:
        if (match := _NAME.search(name)) is not None:
            names[int(match[1]), match[2] or match[3]] = name
    if not names:
        return {}
    stretch = _LARGEST_CODE[_code_dtype(source)] / _LARGEST_CODE[kv_dtype]
    found: dict[int, KVScales] = {}
    with source.files.open() as read:
        for index in range(source.config.num_layers):
            parts = []
            for which in ("k", "v"):
                part = names.get((index, which))
                if part is None:
                    raise CorruptModelFile(
                        f"{source.name}: layer {index} has no scale of {which} for the KV cache, others have, such as "
                        f"{next(iter(names.values()))}; leave kv_cache_dtype auto"
                    )
                parts.append(_checked(source, part, read(part)) * stretch)
            found[index] = KVScales(*parts)
    return found


def fill_scales(model: Model, storage: KVStorage) -> None:
    """Put the scales that a model's attention follows into a storage of codes, once for all vectors there will be."""
    if not isinstance(model, Llama):
        return
    for index, layer in enumerate(model.layers):
        known = layer.attention.kv_scales
        kept = None if known is None else storage.scales(index)
        if kept is not None and known is not None:
            for scales, of_heads in zip(kept, known, strict=True):
                scales.copy_(of_heads.view(1, -1, 1).expand_as(scales))


def _checked(source: FolderSource, name: str, scale: Tensor) -> Tensor:
    """Return a scale for each KV head."""
    num_kv_heads = source.config.num_kv_heads
    if scale.numel() not in (1, num_kv_heads):
        raise CorruptModelFile(
            f"{source.name}: tensor {name!r} has shape {list(scale.shape)}, expected one number or {num_kv_heads}, "
            "one for each KV head"
        )
    scale = scale.float().flatten()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CorruptModelFile(f"{source.name}: tensor {name!r}: expected finite numbers above 0")
    return scale.expand(num_kv_heads).clone()


def _code_dtype(source: FolderSource) -> torch.dtype:
    """Return which codes the scales were made for: int8 where the checkpoint says so, else FP8."""
    settings: list[Any] = []
    for file, section in (("config.json", "quantization_config"), (_SCHEME_FILE, "quantization")):
        path = source.path / file
        if path.is_file():
            settings.append(json.loads(path.read_text(encoding="utf-8")).get(section))
    for one in settings:
        if isinstance(one, Mapping) and _says_int8(one):
            return torch.int8
    return torch.float8_e4m3fn


def _says_int8(settings: Mapping[str, Any]) -> bool:
    scheme = settings.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return scheme.get("type") == "int"
    return str(settings.get("kv_cache_quant_algo", "")).upper() == "INT8"
