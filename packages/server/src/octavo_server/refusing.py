"""How a request is refused whose body has not been read, on a connection that closes."""

from __future__ import annotations

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from octavo_server.errors import ApiError, error_response

_log = logging.getLogger(__name__)

_MAX_BYTES = 16 << 20
_MAX_SECONDS = 2.0


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error, once the client has sent its body; one that asks before it sends is answered at once."""
    if "expect" not in Headers(scope=scope):
        await forget_body(receive)
    await error_response(error, scope["path"])(scope, receive, send)


async def forget_body(receive: Receive) -> None:
    """Read and forget a part of a body: a connection that is closed before it came is reset, the answer with it."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_MAX_SECONDS):
            while num_bytes < _MAX_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        _log.info("a refused body was still coming after %g seconds", _MAX_SECONDS)
