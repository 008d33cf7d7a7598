"""GET /health, GET /ready and GET /version: what a machine asks before it sends requests."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from starlette.responses import Response

from octavo_client.wire_server import Health, Ready, Version
from octavo_server.state import state_of
from octavo_server.streaming import json_response

PACKAGES = ("octavo-client", "octavo-engine", "octavo-kernels", "octavo-kvcache", "octavo-server")

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """Answer 200 if the engine lives, awake or asleep, else 503."""
    state_of(request).engine.check_health()
    return json_response(Health().model_dump())


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Answer 200 if requests are accepted, else 503."""
    state = state_of(request)
    state.engine.check_ready()
    state.drain.check()
    return json_response(Ready(models=list(state.model_names)).model_dump())


@router.get("/version")
async def show_version() -> Response:
    """Return the versions of the server and of the packages behind it."""
    packages = installed_versions()
    return json_response(Version(version=packages["octavo-server"], packages=packages).model_dump())


def installed_versions() -> dict[str, str]:
    """Return the versions of Octavo's distributions that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a server without a model of its own needs neither kernels nor a KV cache
            continue
    return found
