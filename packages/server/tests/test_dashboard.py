"""The Grafana dashboard: every query names a metric that the server has, with labels that it has."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo_server.keys import ApiKey

FILE = Path(__file__).parents[1] / "dashboards" / "grafana.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.fixture
def exposed(make_client, engine):
    """The labels of each sample's name, of a server that has answered a bit of everything."""
    keys = ApiKey.of("alice", "k", requests_per_minute=3), ApiKey.of("bob", "b")
    client = make_client(engine, named_keys=keys)
    for _ in range(4):
        client.post("/v1/completions", json={"prompt": "a"}, headers={"x-api-key": "k"})
    labels = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_every_query_names_metrics_and_labels_that_exist(exposed):
    assert len(QUERIES) > 40
    for title, query in QUERIES:
        names = re.findall(r"octavo_\w+", query)
        assert names, title
        for name in names:
            assert name in exposed, f"{title}: {name} is not exposed"
            grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
            assert grouped <= exposed[name] | {"instance"}, f"{title}: {name} has no label {grouped}"


def test_legends_show_labels_that_the_query_keeps():
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), panel["title"]


def test_parentheses_are_even_and_panels_do_not_overlap():
    taken = set()
    for title, query in QUERIES:
        assert query.count("(") == query.count(")"), title
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_what_operators_ask_about_is_shown():
    shown = " ".join(query for _, query in QUERIES)
    cache = ("kv_cache_waste_ratio", "kv_cache_sharing_ratio", "kv_cache_copies", "prefix_cache_hits")
    for name in (*cache, "queue_held_up", "admission_rejections", "rate_limited", "preemptions_by_kind"):
        assert f"octavo_{name}" in shown
