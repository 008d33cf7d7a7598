"""The engine on an 8B Llama of random weights, beside Transformers: static batches and its continuous batching."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import torch
from offline_throughput import run as run_octavo
from workload import WorkloadRequest, make_fixed_workload, make_workload

from octavo_engine import LLM
from octavo_engine.models.config import ModelConfig
from on_device.bench import Bench
from on_device.models import llama_config, make_llm, make_transformers

BUDGET = 12_000_000_000  # bytes of KV
RESERVED = 2048  # tokens a sequence, contiguous: the ablation
TARGETS = {1: 20.0, 3: 8.5}  # times Transformers' static batches at this budget, by samples a request
UNCAPPED_TARGET, TOKENS_TARGET, BUSY_TARGET = 10.0, 12_500.0, 0.9


def run(bench: Bench) -> None:
    config = llama_config(smoke=bench.smoke)
    budget = bench.size(BUDGET, 1 << 21)
    requests = _requests(bench, config, bench.size(600, 3))
    ours = _octavo(bench, config, requests, budget)
    if importlib.util.find_spec("transformers") is None:
        bench.add("Transformers", not_measured="it is not installed here")
        return
    _transformers(bench, config, requests, budget, ours)


def _requests(bench: Bench, config: ModelConfig, count: int) -> list[WorkloadRequest]:
    if bench.smoke:
        return make_fixed_workload(count, 7, list(range(100, 290)), prompt_length=9, output_length=3)
    return make_workload(count, 7, prompt_mean=202, output_mean=179, vocab_size=config.vocab_size)


def _octavo(bench: Bench, config: ModelConfig, requests: list[WorkloadRequest], budget: int) -> dict[str, float]:
    """Measure ours; return output tokens per second by what was asked."""
    context = bench.size(RESERVED, 64)
    options: dict[str, Any] = {
        "max_model_len": context, "host_kv_bytes": 0, "max_num_batched_tokens": bench.size(8192, 64),
        "watchdog_timeout": None,
    }  # fmt: skip
    few = requests[: bench.size(200, 2)]
    reserving = max(1, budget // (context * _token_bytes(config)))
    found: dict[str, float] = {}
    runs = {
        "n=1": ({"kv_cache_bytes": budget, "max_num_seqs": bench.size(512, 4)}, requests, 1),
        "n=3": ({"kv_cache_bytes": budget, "max_num_seqs": bench.size(512, 6)}, few, 3),
        "reserving": ({"kv_cache_bytes": budget, "max_num_seqs": min(reserving, 512)}, requests, 1),
        "uncapped": (
            {"kv_cache_bytes": bench.size(90 << 30, 1 << 21), "max_num_seqs": bench.size(1024, 4)},
            requests,
            1,
        ),
    }
    llm: LLM | None = None
    for name, (own, asked, n) in runs.items():
        bench.check_time()
        llm = None
        bench.free()
        llm = make_llm(config, bench.device, **options, **own)
        run_octavo(llm, [WorkloadRequest(prompt_ids=asked[0]["prompt_ids"][::-1], out=3)])
        seconds = run_octavo(llm, asked, n)
        found[name] = n * sum(r["out"] for r in asked) / seconds
        targeted = {"target": TOKENS_TARGET} if name == "uncapped" else {}
        bench.add(f"octavo, {name}", value=found[name], unit="output tok/s", seconds=seconds, **targeted)
    gain = found["n=1"] / found["reserving"]
    bench.add(f"octavo, blocks beside {context} contiguous tokens a sequence", value=gain, unit="times")
    assert llm is not None
    if bench.device.type == "cuda":
        for batch in (16, 64):
            bench.add(f"GPU busy, batch {batch}", value=_busy(llm, config, batch), target=BUSY_TARGET, unit="of time")
    graphs = _decode_rates(bench, llm, config)
    llm = None
    bench.free()
    llm = make_llm(config, bench.device, enforce_eager=True, **options, **runs["uncapped"][0])
    eager = _decode_rates(bench, llm, config)
    for batch, rate in graphs.items():
        gain = {"value": rate / eager[batch], "unit": "times", "output_tok_s": rate}
        bench.add(f"decode by graphs beside op by op, batch {batch}", **gain)
    return found


def _decode_rates(bench: Bench, llm: LLM, config: ModelConfig) -> dict[int, float]:
    """Return output tokens per second by how many sequences run at once; what is captured is captured before."""
    token_ids = list(range(100, min(config.vocab_size, 4000)))
    lengths = {"prompt_length": bench.size(32, 9), "output_length": bench.size(256, 3)}
    rates: dict[int, float] = {}
    for batch in (1, 16, 64) if not bench.smoke else (2,):
        seconds = [run_octavo(llm, make_fixed_workload(batch, seed, token_ids, **lengths)) for seed in (11, 12)]
        rates[batch] = batch * lengths["output_length"] / seconds[-1]
    return rates


def _token_bytes(config: ModelConfig) -> int:
    size = getattr(torch, config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * size


def _busy(llm: LLM, config: ModelConfig, batch: int) -> float:
    """Return the share of time in which a kernel ran, from the first to the last of some decode steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    token_ids = list(range(100, min(config.vocab_size, 4000)))
    requests = make_fixed_workload(batch, 11, token_ids, prompt_length=128, output_length=48)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_octavo(llm, requests)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - spans[0][0])


def _transformers(
    bench: Bench, config: ModelConfig, requests: list[WorkloadRequest], budget: int, ours: dict[str, float]
) -> None:
    model = make_transformers(config, bench.device)
    for n, target in TARGETS.items():
        with bench.attempt(f"Transformers, static batches, n={n}", ours=False):
            size = static_batch(requests, budget // (n * _token_bytes(config)))
            rate = _static(bench, model, requests, size, n)
            bench.add(f"Transformers, static batches of {size}, n={n}", value=rate, unit="output tok/s")
            ratio = ours[f"n={n}"] / rate
            bench.add(
                f"octavo beside Transformers, n={n}, {budget / 1e9:.0f} GB of KV",
                value=ratio,
                target=target,
                unit="times",
            )
    best = 0.0
    for size in (128, 256) if not bench.smoke else (2,):
        with bench.attempt(f"Transformers, static batches of {size}, uncapped", ours=False):
            rate = _static(bench, model, requests, size, 1)
            best = max(best, rate)
            bench.add(f"Transformers, static batches of {size}, uncapped", value=rate, unit="output tok/s")
    if best:
        ratio = ours["uncapped"] / best
        bench.add("octavo beside Transformers' best batch, uncapped", value=ratio, target=UNCAPPED_TARGET, unit="times")
    if bench.device.type == "cuda":
        with bench.attempt("Transformers, continuous batching", ours=False):
            rate = _continuous(model, requests[:128])
            bench.add("Transformers, continuous batching", value=rate, unit="output tok/s")
            bench.add("octavo beside its continuous batching", value=ours["uncapped"] / rate, unit="times")


def static_batch(requests: Sequence[WorkloadRequest], num_tokens: int) -> int:
    """Return the largest batch, in order of arrival, whose padded keys and values fit in so many tokens."""
    for size in range(len(requests), 0, -1):
        parts = [requests[start : start + size] for start in range(0, len(requests), size)]
        if all(len(part) * sum(_padded(part)) <= num_tokens for part in parts):
            return size
    raise ValueError(f"not one request fits in {num_tokens} tokens of KV")


def _padded(part: Sequence[WorkloadRequest]) -> tuple[int, int]:
    return max(len(r["prompt_ids"]) for r in part), max(r["out"] for r in part)


def _static(bench: Bench, model: Any, requests: list[WorkloadRequest], size: int, n: int) -> float:
    """Return output tokens per second that were asked for, over whole batches in order of arrival."""
    most = bench.size(45, 5)  # seconds after which no new batch begins
    _generate(model, requests[:1], n, 2)
    tokens, started = 0, time.perf_counter()
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        _generate(model, part, n, _padded(part)[1])
        tokens += n * sum(r["out"] for r in part)
        if time.perf_counter() - started > most:
            break
    return tokens / (time.perf_counter() - started)


@torch.inference_mode()
def _generate(model: Any, part: Sequence[WorkloadRequest], n: int, num_tokens: int) -> None:
    longest = _padded(part)[0]
    ids = torch.zeros(len(part), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(part):
        prompt = torch.tensor(request["prompt_ids"])
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    more: dict[str, Any] = {"do_sample": n > 1} | ({"num_return_sequences": n} if n > 1 else {})
    model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), min_new_tokens=num_tokens,
        max_new_tokens=num_tokens, pad_token_id=0, **more,
    ).cpu()  # fmt: skip


def _continuous(model: Any, requests: list[WorkloadRequest]) -> float:
    """Transformers' own continuous batching gives every request one limit: the mean of what was asked for."""
    from transformers import GenerationConfig

    limit = sum(r["out"] for r in requests) // len(requests)
    options = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(inputs: list[list[int]]) -> Any:
        return model.generate_batch(inputs=inputs, generation_config=options)

    run([requests[0]["prompt_ids"]])
    started = time.perf_counter()
    outputs = run([r["prompt_ids"] for r in requests])
    seconds = time.perf_counter() - started
    return sum(len(output.generated_tokens) for output in outputs.values()) / seconds
