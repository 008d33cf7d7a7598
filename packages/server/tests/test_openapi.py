import pytest

from octavo_server.openapi import document
from octavo_server.operations import OPERATIONS


def test_every_route_is_described_and_nothing_else(client):
    paths = client.get("/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert described == set(OPERATIONS)


def test_a_route_without_a_description_is_not_passed_over(client):
    client.app.add_api_route("/new", lambda: None, methods=["GET"])
    client.app.openapi_schema = None  # the framework's own copy
    with pytest.raises(KeyError, match="/new"):
        document(client.app)


def test_every_reference_leads_somewhere(client):
    text = client.get("/openapi.json").text
    known = set(client.get("/openapi.json").json()["components"]["schemas"])
    named = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named
    assert named <= known


@pytest.mark.parametrize("field", ["prompt", "stop", "top_k", "structured_outputs"])
def test_bodies_have_the_fields_of_openai_and_our_own(client, field):
    schema = client.get("/openapi.json").json()["components"]["schemas"]["CompletionBody"]
    assert field in schema["properties"]
