"""quantize_checkpoint: rounds the linears of a model to few bits and writes it as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.errors import CorruptModelFile, InvalidConfig, UnsupportedModel
from octavo_engine.models.registry import Model
from octavo_engine.quant.calibrate.awq import scale_layers
from octavo_engine.quant.calibrate.batches import check_length, make_batches
from octavo_engine.quant.calibrate.descent import descend
from octavo_engine.quant.calibrate.folder import FolderWriter, check_new, describe, write_description
from octavo_engine.quant.calibrate.gptq import GPTQSettings, damped, gptq
from octavo_engine.quant.calibrate.grid import Codes, round_to_nearest
from octavo_engine.quant.calibrate.layouts import Layout, layout_of
from octavo_engine.quant.calibrate.observed import Observed
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.statistics import InputStatistics
from octavo_engine.quant.calibrate.text import spread
from octavo_engine.quant.calibrate.tune import tune
from octavo_engine.quant.calibrate.walk import Halt, walk
from octavo_engine.weights.load import Weight, load_model
from octavo_engine.weights.source import FolderSource, Source

Progress = Callable[[str, int, int], None]
"""(`linears` or `steps`, how many are rounded or made, how many in all)"""


class Written(NamedTuple):
    """What was written: linears, and bytes of all weights."""

    num_linears: int
    num_bytes: int


def quantize_checkpoint(
    source: Source,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    options: QuantizeOptions,
    progress: Progress | None = None,
) -> Written:
    """Round the linears of a source's layers and write the model.

    Embeddings, head, norms and biases are written in fp16, or in bf16 where the source has them so. Linears of a GGUF
    file may be of block types already; they are expanded first.

    Args:
        source: the model; a folder must not be quantised yet.
        sequences: token ids of the calibration text, of one length; `rtn` does not look at them. Linears are rounded by
            `options.num_sequences` from all over them, steps of tuning take all.
        folder: where to write; new or empty.
        options: how.
        progress: called after each linear, then after each step of tuning.

    Raises:
        UnsupportedModel: if the source is quantised, or the layout cannot hold one of its linears.
        InvalidConfig: if the folder is not empty, or there are no sequences, or they are longer than the model takes.
        CorruptModelFile: if the source's weights cannot be read or are not finite.
    """
    if isinstance(source, FolderSource) and source.scheme is not None:
        raise UnsupportedModel(f"{source.path}: this checkpoint is quantised; give the one that it was made of")
    if source.config.num_experts:
        raise UnsupportedModel(
            f"{source.path}: expected a model without experts, got a mixture of {source.config.num_experts}; quantise "
            "it as it is loaded, with quantization int8 or int4"
        )
    if not sequences and options.method != "rtn":
        raise InvalidConfig(f"method {options.method!r} needs text to calibrate on, got none; give more of it")
    check_length(sequences, source.config)
    check_new(folder)
    layout = layout_of(options)
    described = describe(source, layout.settings())
    quant = Observed()
    model = load_model(source, quant=quant, batch_invariant=False)
    linears = {
        f"{prefix}{shard.name}": (shard.num_rows, linear.in_features)
        for prefix, linear in model.linears()
        for shard in linear.shards
    }
    for name, shape in linears.items():
        layout.check(name, shape)
    writer = FolderWriter(folder)
    others: dict[str, Tensor] = {}
    divisors: dict[str, Tensor] = {}
    with torch.inference_mode():
        chosen = spread(sequences, options.num_sequences)
        rounded = _counted(_rounded(model, quant, chosen, options, divisors), len(linears), progress)
        if not options.tune_steps:
            _write_linears(writer, layout, rounded)
        else:
            held = dict(rounded)
    if options.tune_steps:
        del model, rounded  # its weights are overwritten
        tuned = tune(source, held, sequences, options, progress)
        _write_linears(writer, layout, tuned.codes.items())
        others = tuned.norms
    for name, weight in source.weights():
        if name.removesuffix(".weight") not in linears:
            writer.add(name, _as_written(name, others.get(name, weight), divisors.get(name)))
    writer.finish()
    write_description(source, folder, described)  # last: what is half written cannot be loaded
    return Written(len(linears), sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def _write_linears(writer: FolderWriter, layout: Layout, rounded: Iterable[tuple[str, Codes]]) -> None:
    for name, codes in rounded:
        for part, tensor in layout.tensors(codes).items():
            writer.add(f"{name}.{part}", tensor)


def _counted(
    rounded: Iterable[tuple[str, Codes]], total: int, progress: Progress | None
) -> Iterator[tuple[str, Codes]]:
    for num_done, item in enumerate(rounded, 1):
        yield item
        if progress is not None:
            progress("linears", num_done, total)


def _rounded(
    model: Model,
    quant: Observed,
    sequences: Sequence[Sequence[int]],
    options: QuantizeOptions,
    divisors: dict[str, Tensor],
) -> Iterator[tuple[str, Codes]]:
    """Yield the codes of each of the checkpoint's linears; `divisors` is `scale_layers`'s."""
    if options.method == "rtn":
        for prefix, linear in model.linears():
            weight = linear.parameters.weight
            _check_finite(prefix, weight)
            yield from _shards(prefix, linear.shards, _nearest(weight, options))
        return
    halts = _checked(walk(model, quant, make_batches(model, sequences)))
    if options.method == "awq":
        for scaled in scale_layers(halts, options, len(sequences[0]), divisors):
            codes = _nearest(scaled.weight, options, scaled.importance)
            yield from _shards(scaled.prefix, scaled.shards, codes)
        return
    for halt in halts:
        codes = _gptq(halt, options, halt.statistics(len(sequences[0])))
        halt.parameters.weight.copy_(codes.values())
        yield from _shards(halt.prefix, halt.shards, codes)


def _gptq(halt: Halt, options: QuantizeOptions, statistics: InputStatistics) -> Codes:
    weight = halt.parameters.weight
    settings = GPTQSettings(
        options.bits,
        options.group_size or weight.shape[1],
        options.symmetric,
        options.act_order,
        options.damping,
    )
    codes = gptq(weight, statistics.hessian, settings)
    return descend(codes, weight, damped(statistics.hessian, options.damping), options.descent_rounds)


def _nearest(weight: Tensor, options: QuantizeOptions, importance: Tensor | None = None) -> Codes:
    size = options.group_size or weight.shape[1]
    return round_to_nearest(weight, options.bits, size, symmetric=options.symmetric, importance=importance)


def _shards(prefix: str, shards: Sequence[tuple[str, int]], codes: Codes) -> Iterator[tuple[str, Codes]]:
    start = 0
    for name, num_rows in shards:
        yield f"{prefix}{name}", codes.rows(slice(start, start + num_rows))
        start += num_rows


def _checked(halts: Iterable[Halt]) -> Iterator[Halt]:
    for halt in halts:
        _check_finite(halt.prefix, halt.parameters.weight)
        yield halt


def _check_finite(prefix: str, weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise CorruptModelFile(f"{prefix}*.weight: expected finite numbers, found NaN or infinity")


def _as_written(name: str, weight: Weight, divisor: Tensor | None) -> Tensor:
    """Return a weight that is not rounded, in 16 bits, divided if it takes scales back."""
    if isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 and divisor is None:
        return weight.contiguous()
    values = weight.float() if isinstance(weight, Tensor) else weight.values()
    if divisor is not None:
        values = values / divisor
    if not bool((values.abs() <= torch.finfo(torch.float16).max).all()):
        raise CorruptModelFile(f"{name}: expected numbers that fp16 holds, up to 65504, found NaN or larger ones")
    return values.half()
