"""Traces for OpenTelemetry: a span for each request, and within it the queue, the prompt and the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from octavo_server.config import FREE_ROUTES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

    from octavo_server.context import Answer
    from octavo_server.exchange import EngineWork


class RequestTracer:
    """Makes the spans of each answer when it has ended, from the times that are known then.

    The trace is that of the caller's `traceparent`, if there is one.

    Args:
        processor: takes the spans.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before the name here.
        resource = Resource.create({"service.name": "octavo"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("octavo_server")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_endpoint(cls, url: str) -> RequestTracer:
        """Return one that sends spans to a collector by OTLP over HTTP, in batches, from a thread of its own."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))

    def __call__(self, answer: Answer) -> None:
        """Make the spans of an answer."""
        if answer.route in FREE_ROUTES:
            return
        exchange, offset = answer.exchange, time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{answer.method} {answer.route}",
            context=self._propagator.extract(dict(Headers(scope=answer.scope))),
            kind=self._trace.SpanKind.SERVER,
            start_time=_nanoseconds(exchange.arrival + offset),
            attributes={
                "http.request.method": answer.method,
                "http.route": answer.route,
                "http.response.status_code": answer.status,
                "octavo.request_id": exchange.request_id,
            },
        )
        if exchange.key is not None:
            span.set_attribute("octavo.key", exchange.key.name)
        if answer.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        if exchange.work:
            span.set_attributes(_totals(exchange.work))
        for work in exchange.work:
            self._trace_work(span, work, offset)
        span.end(_nanoseconds(answer.finished + offset))

    def _trace_work(self, parent: Span, work: EngineWork, offset: float) -> None:
        """Make the spans of one prompt; they overlap those of the request's others."""
        times = work.times
        if times is None:  # it was cut off, or its client left
            return
        context = self._trace.set_span_in_context(parent)
        moments = (times.arrival, times.scheduled, times.first_token, times.finished)
        for name, start, end in zip(("queue", "prefill", "decode"), moments[:-1], moments[1:], strict=True):
            if start is not None and end is not None:
                span = self._tracer.start_span(
                    name, context, start_time=_nanoseconds(start + offset), attributes=_totals([work])
                )
                span.end(_nanoseconds(end + offset))


def _totals(work: Sequence[EngineWork]) -> dict[str, int | list[str]]:
    return {
        "gen_ai.usage.input_tokens": sum(len(w.request.prompt_token_ids) for w in work),
        "gen_ai.usage.output_tokens": sum(w.num_tokens for w in work),
        "gen_ai.response.finish_reasons": [reason for w in work for reason in w.finish_reasons],
        "octavo.cached_tokens": sum(w.num_cached_tokens for w in work),
    }


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
