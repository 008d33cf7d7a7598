"""Branch: a token of another request to go on from; Parent and KnownTokens: what the engine makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from octavo_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a new request goes on from: one of the sequences of a request that runs, or was kept when it ended.

    Attributes:
        request_id: of the parent.
        index: which of its sequences.
        branch_at: how many of its output tokens are taken over: 0 goes on from the prompt; None takes all there are.
        continuation: text or token ids that follow, before anything is generated.
    """

    request_id: str
    index: int = 0
    branch_at: int | None = None
    continuation: str | tuple[int, ...] = ()


class Parent(NamedTuple):
    """The sequence whose blocks a new one shares as far as their tokens are the same."""

    request_id: str
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here


class KnownTokens(NamedTuple):
    """The tokens of a sequence as the engine knows them at the moment, and what else its KV depends on."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    salt: bytes
    adapter: bytes = b""

    def upto(self, branch: Branch, salt: bytes = b"") -> list[int]:
        """Return the tokens of the parent that a branch begins with.

        Raises:
            InvalidRequest: if there are fewer output tokens, or the parent belongs to another salt.
        """
        if salt != self.salt:
            raise unknown_parent(branch.request_id, branch.index)  # others must not learn that it exists
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        wanted = num_output_tokens if branch.branch_at is None else branch.branch_at
        if not 0 <= wanted <= num_output_tokens:
            raise InvalidRequest(
                f"branch_at must be between 0 and {num_output_tokens}, the output tokens that the parent has so far, "
                f"got {wanted}",
                param="branch_at",
            )
        return list(self.token_ids[: self.num_prompt_tokens + wanted])


def unknown_parent(request_id: str, index: int) -> InvalidRequest:
    """Return the error for a parent that neither runs nor is kept."""
    return InvalidRequest(
        f"sequence {index} of request {request_id!r} neither runs nor is kept; submit the parent with keep, and "
        "fork it before too many others are kept",
        param="parent_id",
        code="parent_not_found",
    )
