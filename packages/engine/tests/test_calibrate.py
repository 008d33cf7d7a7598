"""Calibrated rounding of models: AWQ's scales, the walk through a model, perplexity, options."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import numpy as np
import torch
from torch import Tensor

from octavo_engine.errors import InvalidConfig
from octavo_engine.quant.calibrate.awq import output_error, search_scales
from octavo_engine.quant.calibrate.batches import make_batches
from octavo_engine.quant.calibrate.grid import round_to_nearest
from octavo_engine.quant.calibrate.observed import Observed
from octavo_engine.quant.calibrate.options import QuantizeOptions
from octavo_engine.quant.calibrate.perplexity import perplexity
from octavo_engine.quant.calibrate.statistics import InputStatistics
from octavo_engine.quant.calibrate.walk import Halt, walk
from octavo_engine.quant.unquantized import DenseParameters
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource


def test_awq_scales_lower_the_error_where_some_inputs_are_large() -> None:
    random = torch.Generator().manual_seed(4)
    weight, x = torch.randn(64, 96, generator=random), torch.randn(300, 96, generator=random)
    x[:, ::17] *= 30
    statistics = InputStatistics.of([x])
    scales = search_scales(weight, statistics, QuantizeOptions(method="awq"))
    hessian = statistics.hessian.float()
    scaled = round_to_nearest(weight * scales, 4, 32, symmetric=False).values() / scales
    plain = round_to_nearest(weight, 4, 32, symmetric=False).values()
    assert output_error(scaled - weight, hessian) < 0.7 * output_error(plain - weight, hessian)
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-4)


def test_first_tokens_count_as_much_as_all_others_where_attention_projects() -> None:
    random = np.random.default_rng(5)
    batches = [random.standard_normal((rows * 8, 6)).astype(np.float32) for rows in (2, 1)]
    x = np.concatenate(batches).astype(np.float64)
    everywhere, first = x.T @ x / 24, x[::8].T @ x[::8] / 3
    inputs = [torch.from_numpy(batch) for batch in batches]
    found = {
        name: Halt("model.layers.0.", ((name, 6),), DenseParameters(torch.empty(6, 6), None), inputs).statistics(8)
        for name in ("q_proj", "o_proj", "gate_proj", "down_proj")
    }
    for name, statistics in found.items():
        expected = (everywhere + first) / 2 if name == "q_proj" else everywhere
        assert np.allclose(statistics.hessian.numpy(), expected, atol=1e-6), name
        assert np.allclose(statistics.mean_abs.numpy(), np.abs(x).mean(axis=0), atol=1e-6)


def test_the_walk_halts_at_every_linear_and_goes_on_with_what_is_written(tiny_llama: tuple[Path, Any]) -> None:
    folder, oracle = tiny_llama[0], copy.deepcopy(tiny_llama[1])
    quant = Observed()
    model = load_model(FolderSource(folder), quant=quant, batch_invariant=False)
    sequences = [[3, 14, 15, 92], [65, 35, 89, 79], [32, 38, 46, 26]]
    batches = [*make_batches(model, sequences[:2]), *make_batches(model, sequences[2:])]
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))

    modules = {name: module for name, module in oracle.named_modules() if name.endswith("_proj")}
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    names = []
    with torch.inference_mode():
        for halt in walk(model, quant, batches):
            start = 0
            for name, num_rows in halt.shards:
                names.append(f"{halt.prefix}{name}")
                rows = halt.parameters.weight[start : start + num_rows]
                rows.mul_(0.9)
                modules[names[-1]].weight.data.mul_(0.9)
                start += num_rows
            seen.clear()
            oracle(torch.tensor(sequences))
            found = torch.cat(halt.inputs)
            expected = seen[names[-1]][0]
            assert torch.allclose(found, expected, atol=1e-4), names[-1]
    for hook in hooks:
        hook.remove()
    assert sorted(names) == sorted(modules)


def test_an_error_on_the_way_reaches_whoever_walks(tiny_llama: tuple[Path, Any]) -> None:
    quant = Observed()
    model = load_model(FolderSource(tiny_llama[0]), quant=quant, batch_invariant=False)
    halts = walk(model, quant, make_batches(model, [[1, 2, 3]]))
    halt = next(halts)
    halt.parameters.weight.resize_(1, 1)
    with pytest.raises(RuntimeError):
        next(halts)
    assert quant.observer is None


def test_perplexity_is_that_of_transformers(tiny_llama: tuple[Path, Any]) -> None:
    folder, oracle = tiny_llama
    sequences = [[(7 * i + 3 * j) % 131 for i in range(20)] for j in range(3)]
    with torch.inference_mode():
        loss = oracle(torch.tensor(sequences), labels=torch.tensor(sequences)).loss
    assert perplexity(load_model(FolderSource(folder)), sequences) == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "best"}, "method 'best' is not one of gptq, awq, rtn"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"method": "awq", "bits": 8}, "method 'awq' is stored in 4 bits, got bits 8"),
        ({"method": "awq", "symmetric": True}, "method 'awq' is stored with zeros"),
        ({"method": "rtn", "act_order": True}, "act_order goes with method 'gptq', got 'rtn'"),
        ({"group_size": 0}, "group_size must be from 1 to"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"num_sequences": 0}, "num_sequences must be at least 1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        QuantizeOptions(**values)
