"""Forks over HTTP: a completion that goes on from a token of another request."""

from __future__ import annotations

from octavo_engine.api import EngineClient
from octavo_engine.branch import Branch, Parent
from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.completions import CompletionBody


async def branch_of(body: CompletionBody, engine: EngineClient) -> tuple[list[int], Parent] | None:
    """Return the token ids that a body with `parent_id` goes on from, and its parent; None for other bodies.

    A prompt, one at most, is what follows the parent's tokens.

    Raises:
        InvalidRequest: if the parent neither runs nor is kept, has fewer tokens, or a field does not go with it.
    """
    if body.parent_id is None:
        for name in ("parent_index", "branch_at"):
            if getattr(body, name) is not None:
                raise InvalidRequest(f"{name} goes with parent_id; name the parent or leave it out", param=name)
        return None
    if body.echo:
        raise InvalidRequest("echo does not go with parent_id; leave one of them out", param="echo")
    prompts = body.prompts if body.prompt else [""]
    if len(prompts) > 1:
        raise InvalidRequest(
            f"one prompt at most follows a parent's tokens, got {len(prompts)}; send several requests", param="prompt"
        )
    continuation = prompts[0] if isinstance(prompts[0], str) else tuple(prompts[0])
    branch = Branch(body.parent_id, body.parent_index or 0, body.branch_at, continuation)
    token_ids = await engine.branch_tokens(branch, (body.cache_salt or "").encode())
    return token_ids, Parent(branch.request_id, branch.index)
