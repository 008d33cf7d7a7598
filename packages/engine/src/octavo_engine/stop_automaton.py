"""StopAutomaton: stop strings as the engine can follow them: by token ids, without any text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopAutomaton:
    """How the text of a sequence comes nearer to a stop string with each token; `text.stop_tokens` makes one.

    A state is how much of a stop string the text ends with: 0 is nothing of any. Most tokens lead from every state to
    the same one, mostly 0, so that few pairs of state and token are listed.

    Attributes:
        next_states: the state after a token, by token, unless a pair says otherwise; 0 for tokens that are not there.
        exceptions: the state after a token, by state and token. In both, None means that a stop string is complete.
        silent: tokens that add no text, and so change no state.
    """

    next_states: Mapping[int, int | None]
    exceptions: Mapping[tuple[int, int], int | None]
    silent: frozenset[int]

    def after(self, state: int, token_id: int) -> int | None:
        """Return the state after a token; None if the token completes a stop string."""
        if token_id in self.silent:
            return state
        if (state, token_id) in self.exceptions:
            return self.exceptions[state, token_id]
        return self.next_states.get(token_id, 0)
