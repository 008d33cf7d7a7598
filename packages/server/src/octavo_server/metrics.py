"""The server's and the engine's figures for Prometheus, in a registry of their own.

Gauges and counters of the engine are read when they are asked for; what only the server sees - latencies, outcomes,
HTTP statuses - is counted as it happens. Names end like vLLM's, so that dashboards port.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_engine.api import EngineClient, EngineInfo, EngineStats
from octavo_engine.timeline import WaitReason
from octavo_engine.types import CompletionDelta, Request, RequestTimes
from octavo_server.context import Answer
from octavo_server.exchange import EngineWork, current_exchange
from octavo_server.token_histogram import TokenHistogram

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30)
_DURATIONS = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
_QUEUE_TIMES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
REJECTIONS = ("overloaded", "rate_limited", "shutting_down")
_CHOICES = (1, 2, 5, 10, 20, 50, 100)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """Everything that is measured for one app.

    Args:
        engine: whose figures are read at each scrape.
    """

    def __init__(self, engine: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        self._define_latencies()
        self._define_sizes()
        self._define_outcomes()

    def _define_latencies(self) -> None:
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCIES
        )
        self.inter_token_latency = TokenHistogram(
            "octavo_inter_token_latency_seconds", "Between one token of a choice and the next.", _LATENCIES
        )
        self.registry.register(self.inter_token_latency)
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time from one token of a finished request to the next.",
            _LATENCIES,
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _DURATIONS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From a request's arrival to its first step.", _QUEUE_TIMES
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From a request's first step to its first token.", _DURATIONS
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "From a request's first token to its end.", _DURATIONS
        )
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "From a request's first step to its end.", _DURATIONS
        )

    def _define_sizes(self) -> None:
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens in a finished request's prompt.", _TOKENS)
        self.generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a finished request, over all its choices.", _TOKENS
        )

        self.choices_wanted = self._histogram(
            "request_params_n", "Choices that a finished request asked for.", _CHOICES
        )
        self.max_tokens_wanted = self._histogram(
            "request_params_max_tokens", "The most tokens that a finished request asked for, if it said so.", _TOKENS
        )
        self.key_tokens = self._counter(
            "key_tokens", "Tokens of finished requests by API key, of the prompt and generated.", ("key", "kind")
        )

    def _define_outcomes(self) -> None:
        self.success = self._counter(
            "request_success", "Choices that ended well, by finish reason.", ("finished_reason",)
        )
        for reason in ("stop", "length"):
            self.success.labels(reason)
        self.aborted = self._counter("requests_aborted", "Requests whose client left before their end.")
        self.failed = self._counter("requests_failed", "Requests that the engine could not compute.")
        self.cut_off = self._counter("requests_cut_off", "Requests that the server ended early, by why.", ("reason",))
        for reason in ("timeout", "shutting_down"):
            self.cut_off.labels(reason)
        self.rejections = self._counter(
            "admission_rejections", "HTTP requests that were not taken in, by why.", ("reason",)
        )
        for reason in REJECTIONS:
            self.rejections.labels(reason)
        self.rate_limited = self._counter(
            "rate_limited", "HTTP requests refused for a limit of their key.", ("key", "limit")
        )
        self.http_requests = self._counter(
            "http_requests",
            "HTTP requests by method, route template and status; 499 is a client that left.",
            ("method", "route", "status"),
        )
        self.http_duration = Histogram(
            "octavo_http_request_duration_seconds",
            "From the first byte of an HTTP request to the last of its answer.",
            ("method", "route"),
            buckets=_DURATIONS,
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"octavo_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"octavo_{name}", text, labels, registry=self.registry)

    def reject(self, reason: str) -> None:
        """Count an HTTP request that was not taken in; the reason is one of REJECTIONS."""
        self.rejections.labels(reason).inc()

    def limit_rate(self, key: str, limit: str) -> None:
        """Count an HTTP request that was refused for a limit of its key."""
        self.reject("rate_limited")
        self.rate_limited.labels(key, limit).inc()

    def track(self, request: Request) -> RequestTrack:
        """Start to measure one request to the engine; a context manager, whose end decides the outcome."""
        return RequestTrack(self, request)

    def observe_http(self, answer: Answer) -> None:
        """Count one HTTP request."""
        method = answer.method if answer.method in _METHODS else "other"
        self.http_requests.labels(method, answer.route, str(answer.status)).inc()
        self.http_duration.labels(method, answer.route).observe(answer.seconds)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return all figures and their content type, in the format that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class RequestTrack:
    """Measures one request while its deltas come; it ends as finished, aborted or failed, exactly once."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._request = request
        self._arrival = time.monotonic()
        self._num_open = request.sampling.n
        self._last_token: dict[int, float] = {}
        self._work = EngineWork(request)
        self._exchange = current_exchange()
        if self._exchange is not None:
            self._exchange.work.append(self._work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._num_open:
            self._finish()
        elif kind is not None and issubclass(kind, Exception):
            self._metrics.failed.inc()
        elif self._exchange is not None and self._exchange.ended_by is not None:
            self._metrics.cut_off.labels(self._exchange.ended_by.code).inc()
        else:  # cancelled or closed
            self._metrics.aborted.inc()

    def observe(self, delta: CompletionDelta, now: float) -> None:
        """Take in a delta that came at a time of the monotonic clock."""
        if delta.token_ids:
            self._observe_tokens(delta.index, len(delta.token_ids), now)
        if delta.finish_reason is not None:
            work = self._work
            work.num_cached_tokens = max(work.num_cached_tokens, delta.cached.total)
            work.finish_reasons.append(delta.finish_reason.value)
            if self._num_open == self._request.sampling.n and delta.times is not None:
                work.times = delta.times
                self._observe_times(delta.times)
            self._num_open -= 1
            self._metrics.success.labels(delta.finish_reason.value).inc()

    def _observe_tokens(self, index: int, num_tokens: int, now: float) -> None:
        if self._work.first_token is None:
            self._work.first_token = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
        self._work.num_tokens += num_tokens
        if self._exchange is not None and self._exchange.budget is not None:
            self._exchange.budget.take_tokens(num_tokens)
        last = self._last_token.get(index)
        self._last_token[index] = now
        # Tokens that came together share the time since those before them; the first of a choice has none before it.
        if last is not None:
            self._metrics.inter_token_latency.observe((now - last) / num_tokens, num_tokens)
        else:
            self._metrics.inter_token_latency.observe(0.0, num_tokens - 1)

    def _observe_times(self, times: RequestTimes) -> None:
        if times.scheduled is None:
            return
        self._metrics.queue_time.observe(times.scheduled - times.arrival)
        self._metrics.inference_time.observe(times.finished - times.scheduled)
        if times.first_token is not None:
            self._metrics.prefill_time.observe(times.first_token - times.scheduled)
            self._metrics.decode_time.observe(times.finished - times.first_token)

    def _finish(self) -> None:
        num_tokens, first_token, now = self._work.num_tokens, self._work.first_token, time.monotonic()
        self._metrics.e2e_latency.observe(now - self._arrival)
        self._metrics.prompt_tokens.observe(len(self._request.prompt_token_ids))
        self._metrics.generation_tokens.observe(num_tokens)
        self._metrics.choices_wanted.observe(self._request.sampling.n)
        if self._request.sampling.max_tokens is not None:
            self._metrics.max_tokens_wanted.observe(self._request.sampling.max_tokens)
        if first_token is not None and num_tokens > 1:
            self._metrics.time_per_output_token.observe((now - first_token) / (num_tokens - 1))
        if self._exchange is not None and self._exchange.key is not None:
            key = self._exchange.key.name
            self._metrics.key_tokens.labels(key, "prompt").inc(len(self._request.prompt_token_ids))
            self._metrics.key_tokens.labels(key, "generation").inc(num_tokens)


class _EngineCollector(Collector):
    """Reads the engine's own figures at each scrape."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Name nothing ahead, so that registering does not ask the engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield _info(self._engine.info)
        for name, text, value in _gauges(stats):
            yield GaugeMetricFamily(f"octavo_{name}", text, value=value)
        for name, text, count in _counters(stats):
            yield CounterMetricFamily(f"octavo_{name}", text, value=count)
        yield _prompt_tokens_by_source(stats)
        fallbacks = CounterMetricFamily(
            "octavo_kernel_fallbacks", "Calls that ran on another backend than the wanted one.", labels=("kernel",)
        )
        for kernel, count in stats.fallbacks.items():
            fallbacks.add_metric((kernel,), count)
        yield fallbacks
        yield _preemptions(stats)
        yield _held_up(stats)
        waited = "Steps that waited for the results of earlier ones, by what needed them."
        yield _by_reason("octavo_steps_waited", waited, stats.overlap.num_waited)
        eager = "Steps whose model ran op by op though there are graphs, by what stood in the way of one."
        yield _by_reason("octavo_eager_steps", eager, stats.overlap.graphs.num_eager)
        yield _sleep_state(self._engine.sleep_level)


def _info(info: EngineInfo) -> Metric:
    labels = {
        "model": info.model_name,
        "architecture": info.architecture,
        "dtype": info.dtype,
        "kv_dtype": info.kv_dtype,
        "mode": info.mode,
        "device": info.device,
        "kernel_backend": info.kernel_backend,
        "deterministic": str(info.deterministic).lower(),
        "block_size": str(info.block_size),
        "num_blocks": str(info.num_blocks),
        "max_model_len": str(info.max_model_len),
        "max_num_seqs": str(info.max_num_seqs),
    }
    family = GaugeMetricFamily(
        "octavo_engine_info", "What is served and how it was set up; always 1.", labels=list(labels)
    )
    family.add_metric(list(labels.values()), 1)
    return family


def _prompt_tokens_by_source(stats: EngineStats) -> Metric:
    family = CounterMetricFamily(
        "octavo_prompt_tokens_by_source",
        "Prompt tokens of admitted requests, by where their keys and values came from.",
        labels=("source",),
    )
    for source, num_tokens in stats.cached_prompt_tokens._asdict().items():
        family.add_metric((source,), num_tokens)
    return family


def _preemptions(stats: EngineStats) -> Metric:
    family = CounterMetricFamily(
        "octavo_preemptions_by_kind", "Preempted sequences, by what became of their blocks.", labels=("kind",)
    )
    family.add_metric(("recompute",), stats.preemption.num_recomputed)
    family.add_metric(("swap",), stats.preemption.num_swapped)
    return family


def _sleep_state(level: int) -> Metric:
    family = GaugeMetricFamily(
        "octavo_engine_sleep_state", "1 for the state that the engine is in, 0 for the others.", labels=("sleep_state",)
    )
    for own, state in enumerate(("awake", "weights_offloaded", "discard_all")):  # vLLM's words for the levels
        family.add_metric((state,), own == level)
    return family


def _held_up(stats: EngineStats) -> Metric:
    family = CounterMetricFamily(
        "octavo_queue_held_up_steps", "Steps that left somebody waiting, by what was missing.", labels=("reason",)
    )
    for reason in WaitReason:
        family.add_metric((reason.value,), stats.num_held_up.get(reason.value, 0))
    return family


def _by_reason(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=("reason",))
    for reason, count in counts.items():
        family.add_metric((reason,), count)
    return family


def _gauges(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    cache = stats.cache
    usable = max(cache.num_usable, 1)
    yield "num_requests_running", "Sequences that take part in steps.", stats.num_running
    yield "num_requests_waiting", "Sequences that wait for their first step, or to resume.", stats.num_waiting
    yield "kv_cache_usage_perc", "Blocks of the KV cache in use, from 0 to 1.", cache.num_used / usable
    yield "kv_cache_blocks_used", "Blocks of the KV cache in use.", cache.num_used
    yield "kv_cache_blocks_cached", "Free blocks whose content can still be hit.", cache.num_cached
    yield "kv_cache_blocks_shared", "Blocks that more than one sequence holds.", cache.num_shared
    yield "kv_cache_blocks_pinned", "Blocks that pins hold.", cache.num_pinned
    yield "kv_cache_pins", "Prefixes that are pinned.", cache.num_pins
    sharing = cache.num_table_blocks / cache.num_used if cache.num_used else 1.0
    yield "kv_cache_sharing_ratio", "Blocks in all block tables over blocks in use; above 1 is saved.", sharing
    yield "kv_host_blocks_used", "Blocks of the host that hold what waiting sequences need.", cache.host.num_used
    yield "kv_host_usage_perc", "Blocks of the host in use, from 0 to 1.", cache.host.usage
    yield "adapters_loaded", "Versions of adapters in the host's memory.", stats.adapters.num_loaded
    yield "adapters_active", "Adapters that sequences run with.", stats.adapters.num_active
    yield "expert_imbalance", "Tokens of a layer's busiest expert over an even share, mean.", stats.experts.imbalance
    yield "kv_cache_waste_ratio", "Slots in allocated blocks without a live token, mean over steps.", stats.mean_waste


def _counters(stats: EngineStats) -> Iterator[tuple[str, str, int]]:
    cache = stats.cache
    yield "engine_steps", "Steps of the engine.", stats.num_steps
    yield "lost_steps", "Steps in which a process with a part of the model was lost.", stats.num_lost_steps
    yield (
        "overlapped_steps",
        "Steps launched before the results of earlier ones were read.",
        stats.overlap.num_overlapped,
    )
    yield "replayed_steps", "Steps whose model was a graph that was replayed.", stats.overlap.graphs.num_replayed
    yield "captured_graphs", "Graphs of steps that were captured.", stats.overlap.graphs.num_captured
    yield "num_preemptions", "Sequences that had to give up their blocks and wait.", stats.num_preemptions
    yield "prompt_tokens", "Prompt tokens of requests.", stats.num_prompt_tokens
    yield "prompt_tokens_cached", "Prompt tokens that were not computed but hit.", stats.num_cached_prompt_tokens
    yield "generation_tokens", "Tokens generated.", stats.num_generation_tokens
    first, resumed = cache.lookups, cache.resumed_lookups
    yield "prefix_cache_lookups", "Sequences that were looked up when they were first admitted.", first.num_lookups
    yield "prefix_cache_queries", "Tokens looked up in the prefix cache for them.", first.num_query_tokens
    yield "prefix_cache_hits", "Tokens found in the prefix cache for them.", first.num_hit_tokens
    yield (
        "prefix_cache_partial_hits",
        "Those at the start of a block that goes on otherwise.",
        first.num_partial_hit_tokens,
    )
    yield "prefix_cache_resumed_queries", "Tokens looked up for sequences that resumed.", resumed.num_query_tokens
    yield "prefix_cache_resumed_hits", "Tokens found for sequences that resumed.", resumed.num_hit_tokens
    yield "kv_cache_blocks_deduplicated", "Blocks given back for others with the same content.", cache.num_deduplicated
    yield "kv_cache_copies", "Blocks copied before a write because they were shared.", cache.num_copies
    yield "kv_cache_evictions", "Cached blocks given to new content.", cache.num_evictions
    yield "kv_blocks_swapped_out", "Blocks copied to the host.", cache.host.num_blocks_out
    yield "kv_blocks_swapped_in", "Blocks copied back from the host.", cache.host.num_blocks_in
