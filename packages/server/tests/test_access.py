"""Who may call: keys with names, and the routes that only administrators reach."""

import pytest
from fastapi import APIRouter, Depends
from starlette.responses import Response
from starlette.testclient import TestClient

from octavo_engine.types import Tenant
from octavo_server import ServerSettings, create_app
from octavo_server import app as app_module
from octavo_server.access import admin_only
from octavo_server.config import FREE_ROUTES, is_loopback
from octavo_server.keys import ApiKey

MODELS, ADMIN = "/v1/models", "/an/admin/route"


def client_of(engine, **settings):
    app = create_app(engine, ServerSettings(**settings))
    router = APIRouter(dependencies=[Depends(admin_only)])

    @router.post(ADMIN)
    async def act() -> Response:
        return Response(b"done")

    app.include_router(router)
    return TestClient(app)


def bearer(key):
    return {"authorization": f"Bearer {key}"} if key else {}


@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({"local_only": True}, None, 200),
        ({"local_only": True}, "anything", 200),
        ({"local_only": False}, None, 403),
        ({"local_only": True, "api_keys": ("user",)}, None, 401),
        ({"local_only": True, "api_keys": ("user",)}, "user", 403),
        ({"local_only": True, "named_keys": (ApiKey.of("bob", "user"),)}, "user", 403),
        ({"local_only": True, "admin_api_key": "root"}, None, 401),
        ({"local_only": True, "admin_api_key": "root"}, "user", 401),
        ({"local_only": True, "admin_api_key": "root"}, "root", 200),
        ({"local_only": False, "admin_api_key": "root"}, "root", 200),
        ({"api_keys": ("user",), "admin_api_key": "root"}, None, 401),
        ({"api_keys": ("user",), "admin_api_key": "root"}, "user", 403),
        ({"api_keys": ("user",), "admin_api_key": "root"}, "root", 200),
    ],
    ids=str,
)
def test_an_admin_route_opens_by_the_rule(engine, settings, key, status):
    response = client_of(engine, **settings).post(ADMIN, headers=bearer(key))
    assert response.status_code == status, response.text
    if status == 403:
        error = response.json()["error"]
        assert error["code"] == "admin_key_needed"
        assert "--admin-api-key" in error["message"]
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200)])
def test_another_sites_page_cannot_reach_an_open_admin_route(engine, site, status):
    headers = {"sec-fetch-site": site}
    assert client_of(engine, local_only=True).post(ADMIN, headers=headers).status_code == status
    with_key = client_of(engine, admin_api_key="root").post(ADMIN, headers=headers | bearer("root"))
    assert with_key.status_code == 200


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("user", 200), ("root", 200), ("other", 401)])
def test_the_admin_key_opens_the_other_routes_too(engine, key, status):
    client = client_of(engine, api_keys=("user",), admin_api_key="root")
    assert client.get(MODELS, headers=bearer(key)).status_code == status


def test_an_admin_key_alone_leaves_the_other_routes_open(engine):
    assert client_of(engine, admin_api_key="root").get(MODELS).status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.4", False),
        ("my.host", False),
    ],
)
def test_an_address_of_this_machine_alone_is_known(host, loopback):
    assert is_loopback(host) is loopback


def test_a_keys_requests_are_in_its_name_and_share(engine):
    client = client_of(engine, named_keys=(ApiKey.of("bob", "user", share=2.0),), admin_api_key="root")
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
        for key in ("user", "root"):
            assert client.post(path, json=body, headers=bearer(key)).status_code == 200
    assert [request.tenant for request in engine.requests] == [Tenant("bob", 2.0), Tenant("admin")] * 2


def test_without_keys_requests_are_in_nobodys_name(client, engine):
    client.post("/v1/completions", json={"prompt": "a"})
    assert engine.requests[0].tenant is None


def test_every_route_but_the_monitors_needs_a_key(engine):
    client = client_of(engine, api_keys=("user",))
    paths = {route.path for module in app_module._ROUTES for route in module.router.routes}
    assert len(paths) > 20
    for path in paths | {"/v1/nothing", "/openapi.json", "/docs"}:
        for method in ("GET", "POST", "DELETE"):
            status = client.request(method, path).status_code
            assert (status != 401) if path in FREE_ROUTES else (status == 401), (method, path)
