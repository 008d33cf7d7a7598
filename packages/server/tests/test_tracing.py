"""Traces: the spans of a request, and whose trace they are in."""

import subprocess
import sys

import pytest

from octavo_engine.errors import InvalidConfig
from octavo_server import ServerSettings, config, tracing
from octavo_server.keys import ApiKey

TEXT = "/v1/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    """The spans of what was served, in order of their ends."""
    pytest.importorskip("opentelemetry.sdk", reason="traces need the extra otel")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    to_memory = tracing.RequestTracer(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.RequestTracer, "to_endpoint", lambda url: to_memory)
    return exporter.get_finished_spans


@pytest.fixture
def traced(make_client, engine, spans):
    return make_client(engine, otlp_traces_endpoint="http://collector", named_keys=(ApiKey.of("alice", "k"),))


def test_a_request_is_a_span_with_queue_prefill_and_decode(traced, engine, spans):
    engine.num_cached_tokens = 2
    headers = {"x-api-key": "k", "x-request-id": "r1", "traceparent": PARENT}
    assert traced.post(TEXT, json={"prompt": "abcd", "max_tokens": 3}, headers=headers).status_code == 200
    queue, prefill, decode, request = spans()
    assert [span.name for span in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert (request.name, request.kind.name) == (f"POST {TEXT}", "SERVER")
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": TEXT,
        "http.response.status_code": 200,
        "octavo.request_id": "r1",
        "octavo.key": "alice",
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "octavo.cached_tokens": 2,
    }
    assert f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    assert {span.parent.span_id for span in (queue, prefill, decode)} == {request.context.span_id}
    seconds = [round((span.end_time - span.start_time) / 1e9, 3) for span in (queue, prefill, decode)]
    assert seconds == [0.25, 0.25, 0.5]
    assert request.resource.attributes["service.name"] == "octavo"


@pytest.mark.parametrize("given", [None, "nonsense", "00-0-0-01"])
def test_without_a_callers_trace_it_begins_one(traced, spans, given):
    headers = {"x-api-key": "k"} | ({"traceparent": given} if given else {})
    traced.get("/v1/models", headers=headers)
    (span,) = spans()
    assert span.parent is None
    assert "gen_ai.usage.input_tokens" not in span.attributes


def test_each_prompt_has_its_own_spans(traced, spans):
    traced.post(TEXT, json={"prompt": ["a", "bc"]}, headers={"x-api-key": "k"})
    assert [span.name for span in spans()] == ["queue", "prefill", "decode"] * 2 + [f"POST {TEXT}"]


def test_a_failure_is_marked_and_monitors_are_not_traced(traced, engine, spans):
    engine.fail_after = 1
    traced.post(TEXT, json={"prompt": "a"}, headers={"x-api-key": "k"})
    traced.get("/health")
    (span,) = spans()
    assert not span.status.is_ok
    assert span.attributes["http.response.status_code"] == 500


def test_spans_go_to_the_endpoint():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="traces need the extra otel")
    tracer = tracing.RequestTracer.to_endpoint("http://127.0.0.1:9/v1/traces")
    (processor,) = tracer._provider._active_span_processor._span_processors
    assert processor.span_exporter._endpoint == "http://127.0.0.1:9/v1/traces"
    tracer._provider.shutdown()


def test_without_opentelemetry_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(InvalidConfig, match=r"pip install 'octavo-server\[otel\]'"):
        ServerSettings(otlp_traces_endpoint="http://collector")


def test_an_endpoint_that_is_no_url_is_refused():
    with pytest.raises(InvalidConfig, match="must be an http URL"):
        ServerSettings(otlp_traces_endpoint="collector:4317")


def test_traces_cost_nothing_while_they_are_off():
    code = "import sys, octavo_server.app; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
