import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

TEXT = "/v1/completions"


def samples(client, **labels):
    """All samples by name, of those with the given labels."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                found[sample.name] = sample.value
    return found


def test_default_format_is_prometheus_text(client):
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_openmetrics_is_served_if_asked_for(client):
    accept = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"
    response = client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert response.text.endswith("# EOF\n")
    assert len(list(parse_openmetrics(response.text))) > 30


def test_every_family_has_help_type_and_a_proper_name(client):
    client.post(TEXT, json={"prompt": "a"})
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    assert len(families) > 30
    for family in families:
        assert family.documentation, family.name
        assert family.type in ("gauge", "counter", "histogram"), family.name
        assert ":" not in family.name
        assert family.name.startswith(("octavo_", "process_"))
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        if family.type == "histogram":
            assert any(sample.labels.get("le") == "+Inf" for sample in family.samples), family.name


def test_two_requests_of_three_tokens_are_counted_exactly(client, engine):
    engine.replies = ["xyz"]
    for _ in range(2):
        client.post(TEXT, json={"prompt": "abcd", "max_tokens": 3})
    got = samples(client)
    assert got["octavo_time_to_first_token_seconds_count"] == 2
    assert got["octavo_inter_token_latency_seconds_count"] == 2 * (3 - 1)
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert got[f"octavo_{name}_seconds_count"] == 2
    assert got["octavo_request_queue_time_seconds_sum"] == 0.5
    assert got["octavo_request_prefill_time_seconds_sum"] == 0.5
    assert got["octavo_request_decode_time_seconds_sum"] == 1.0
    assert got["octavo_request_inference_time_seconds_sum"] == 1.5
    assert got["octavo_request_prompt_tokens_sum"] == 8
    assert got["octavo_request_generation_tokens_sum"] == 6
    assert got["octavo_prompt_tokens_total"] == 8
    assert got["octavo_generation_tokens_total"] == 6
    assert got["octavo_num_requests_running"] == 0
    assert samples(client, finished_reason="length")["octavo_request_success_total"] == 2
    assert samples(client, finished_reason="stop")["octavo_request_success_total"] == 0
    assert got["octavo_requests_aborted_total"] == 0
    assert got["octavo_requests_failed_total"] == 0


@pytest.mark.parametrize("step", [1, 2, 100])
def test_tokens_that_come_together_count_one_by_one(client, engine, step):
    engine.step = step
    client.post(TEXT, json={"prompt": "a"})  # 7 characters and the end token
    assert samples(client)["octavo_inter_token_latency_seconds_count"] == 7


def test_engine_figures_are_read_at_each_scrape(client):
    got = samples(client)
    assert got["octavo_kv_cache_usage_perc"] == 0.25
    assert got["octavo_kv_cache_sharing_ratio"] == 2.0
    assert got["octavo_kv_cache_waste_ratio"] == 0.025
    assert got["octavo_kv_cache_copies_total"] == 3
    assert got["octavo_prefix_cache_queries_total"] == 640
    assert got["octavo_prefix_cache_hits_total"] == 320
    assert got["octavo_num_preemptions_total"] == 1
    assert samples(client, kind="recompute")["octavo_preemptions_by_kind_total"] == 3
    assert samples(client, kind="swap")["octavo_preemptions_by_kind_total"] == 4
    assert (got["octavo_kv_host_blocks_used"], got["octavo_kv_host_usage_perc"]) == (5, 0.25)
    assert (got["octavo_kv_blocks_swapped_out_total"], got["octavo_kv_blocks_swapped_in_total"]) == (12, 11)
    assert samples(client, reason="blocks")["octavo_queue_held_up_steps_total"] == 6
    assert samples(client, reason="rows")["octavo_queue_held_up_steps_total"] == 0
    assert got["octavo_overlapped_steps_total"] == 5
    assert got["octavo_expert_imbalance"] == 1.25
    assert samples(client, reason="rules")["octavo_steps_waited_total"] == 2
    assert (got["octavo_replayed_steps_total"], got["octavo_captured_graphs_total"]) == (4, 3)
    assert samples(client, reason="prompt")["octavo_eager_steps_total"] == 1
    assert samples(client, kernel="paged_attention")["octavo_kernel_fallbacks_total"] == 2
    assert (
        samples(client, model="org/fake-model", dtype="float32", kv_dtype="float32", mode="exact")["octavo_engine_info"]
        == 1
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "route", "status"),
    [
        ("POST", TEXT, {"prompt": "a"}, TEXT, 200),
        ("POST", TEXT, {"prompt": ""}, TEXT, 400),
        ("POST", TEXT, {"prompt": "a", "n": 0}, TEXT, 400),
        ("POST", TEXT, [], TEXT, 400),
        ("GET", TEXT, None, TEXT, 405),
        ("GET", "/v1/models/a/b", None, "/v1/models/{model_id:path}", 404),
        ("GET", "/nothing/17", None, "unmatched", 404),
    ],
)
def test_http_requests_count_by_route_template_and_status(client, method, path, body, route, status):
    client.request(method, path, json=body)
    got = samples(client, method=method, route=route)
    assert samples(client, method=method, route=route, status=str(status))["octavo_http_requests_total"] == 1
    assert got["octavo_http_request_duration_seconds_count"] == 1


@pytest.mark.parametrize(
    ("path", "route"),
    [(TEXT, TEXT), ("/v1/models/a/b", "/v1/models/{model_id:path}"), ("/nothing/17", "unmatched")],
)
def test_what_is_refused_before_its_route_counts_for_it(make_client, engine, path, route):
    client = make_client(engine, api_keys=("k",))
    assert client.get(path).status_code == 401
    assert samples(client, method="GET", route=route, status="401")["octavo_http_requests_total"] == 1


def test_an_invented_method_does_not_make_a_label(client):
    client.request("BREW", "/nothing")
    assert samples(client, method="other", route="unmatched")["octavo_http_requests_total"] == 1


def test_a_failed_request_is_neither_success_nor_abort(client, engine):
    engine.fail_after = 1
    client.post(TEXT, json={"prompt": "a"})
    got = samples(client)
    assert got["octavo_requests_failed_total"] == 1
    assert got["octavo_requests_aborted_total"] == 0
    assert samples(client, status="500")["octavo_http_requests_total"] == 1


def test_two_apps_count_apart(make_client, engine):
    first, second = make_client(engine), make_client(engine)
    first.post(TEXT, json={"prompt": "a"})
    assert samples(first)["octavo_time_to_first_token_seconds_count"] == 1
    assert samples(second)["octavo_time_to_first_token_seconds_count"] == 0
