"""Puts the HTTP application together: routes, errors and middleware around one engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from octavo_engine.api import EngineClient
from octavo_server.access import ApiKeyGate
from octavo_server.config import ServerSettings
from octavo_server.context import Observer, RequestContext
from octavo_server.drain import DrainGate
from octavo_server.durable import Durable
from octavo_server.errors import ERRORS, ApiError, handle_error, handle_http_exception
from octavo_server.logs import request_logger
from octavo_server.middleware import BodyLimit, Cors, RateGate
from octavo_server.rate_limits import budgets_of
from octavo_server.routes import (
    adapters,
    admin,
    batches,
    cache,
    chat,
    completions,
    embeddings,
    files,
    generate,
    health,
    messages,
    metrics,
    models,
    openapi,
    requests,
    rerank,
    responses,
    tokens,
)
from octavo_server.state import ServerState
from octavo_server.store.store import Store
from octavo_server.tracing import RequestTracer
from octavo_server.uploads import FORM_BYTES

_ROUTES = (
    adapters,
    admin,
    batches,
    cache,
    chat,
    completions,
    embeddings,
    files,
    generate,
    health,
    messages,
    metrics,
    models,
    openapi,
    requests,
    rerank,
    responses,
    tokens,
)


def create_app(engine: EngineClient, settings: ServerSettings | None = None, store: Store | None = None) -> FastAPI:
    """Return an ASGI application that serves an engine, in this process or in another, under OpenAI's interface.

    The caller owns the engine and the store: the application neither starts nor closes them. Without a store it keeps
    responses, files and batches in memory. Work that goes on from the store begins with the application's lifespan.

    Example:
        >>> app = create_app(engine, ServerSettings(api_keys=("secret",)))  # doctest: +SKIP
        >>> uvicorn.run(app, port=8000)  # doctest: +SKIP
    """
    settings = settings or ServerSettings()
    state = ServerState.build(engine, settings)
    # No generated pages: the interface is OpenAI's, and bodies are read by hand for errors in its shape.
    app = FastAPI(
        title="Octavo", openapi_url=None, redirect_slashes=False, middleware=_middleware(state), lifespan=_lifespan
    )
    app.state.server = state
    app.state.durable = Durable(app, state, store or Store())
    for module in _ROUTES:
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, handle_http_exception)
    for kind in (ApiError, ValidationError, *ERRORS):
        if kind is not Exception:  # an unforeseen error passes on to RequestContext, which logs it with its id
            app.add_exception_handler(kind, handle_error)
    return app


def _observers(state: ServerState) -> list[Observer]:
    """Return what is told of each answer."""
    whole = partial(state.engine.text.tokenizer.decode, skip_special_tokens=False)
    decode = whole if state.settings.log_prompts else None
    observers: list[Observer] = [state.metrics.observe_http, request_logger(decode)]
    if (endpoint := state.settings.otlp_traces_endpoint) is not None:
        observers.append(RequestTracer.to_endpoint(endpoint))
    return observers


def _middleware(state: ServerState) -> list[Middleware]:
    """Return the layers, outermost first."""
    settings = state.settings
    keys = settings.key_ring()
    budgets = budgets_of(keys, state.metrics.limit_rate)
    layers = [
        Middleware(
            RequestContext,
            observers=_observers(state),
            routes=[route for module in _ROUTES for route in module.router.routes],
            request_timeout=settings.request_timeout,
        ),
        Middleware(Cors, allowed_origins=settings.allowed_origins),
        Middleware(DrainGate, drain=state.drain),
    ]
    if settings.has_keys or settings.admin_api_key:
        layers.append(Middleware(ApiKeyGate, keys=keys))
    if budgets:
        layers.append(Middleware(RateGate, budgets=budgets))
    layers.append(
        Middleware(
            BodyLimit,
            max_body_bytes=settings.max_body_bytes,
            timeout=settings.body_timeout,
            uploads={"/v1/files": settings.max_file_bytes + FORM_BYTES},
        )
    )
    return layers


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    durable: Durable = app.state.durable
    await durable.start()
    try:
        yield
    finally:
        await durable.close()
