"""Who may call: API keys for every route, and the admin key for those that change the server."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo_server.config import FREE_ROUTES
from octavo_server.errors import ApiError, error_response
from octavo_server.exchange import current_exchange
from octavo_server.keys import KeyRing
from octavo_server.state import state_of


class ApiKeyGate:
    """Finds out who calls, by `Authorization: Bearer` or `X-Api-Key`; lets only known keys pass where keys are set."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in FREE_ROUTES:
            key = self._keys.find(_given(Headers(scope=scope)))
            if key is None and self._keys.needed:
                await error_response(_unknown_key(), scope["path"])(scope, receive, send)
                return
            exchange = current_exchange()
            assert exchange is not None
            exchange.key, exchange.is_admin = key, key is not None and key is self._keys.admin
        await self._app(scope, receive, send)


async def admin_only(request: Request) -> None:
    """Let only administrators reach a route; a dependency: `APIRouter(dependencies=[Depends(admin_only)])`.

    With an admin key set, only that key opens the route. Without one it is open where the server asks nobody for a
    key and only programs of this machine can reach it.

    Raises:
        ApiError: 401 without a key where the admin key is needed, else 403; says what to do.
    """
    exchange, settings = current_exchange(), state_of(request).settings
    if exchange is not None and exchange.is_admin:
        return
    if settings.admin_api_key is not None:
        if exchange is None or exchange.key is None:
            raise _unknown_key("the admin key")
        raise _forbidden("this route needs the admin key, another key came; send the one of --admin-api-key")
    if settings.has_keys or not settings.local_only:
        raise _forbidden(
            "this route is closed, as the server has API keys or listens beyond this machine, and no admin key; "
            "start it with --admin-api-key"
        )
    # A page from anywhere may let its reader's browser call a server on the reader's machine.
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise _forbidden("this route does not answer other sites' pages without an admin key; set --admin-api-key")


def _given(headers: Headers) -> str:
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _unknown_key(which: str = "a valid API key") -> ApiError:
    return ApiError(
        401,
        f"{which} is needed; send it as Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="admin_key_needed")
