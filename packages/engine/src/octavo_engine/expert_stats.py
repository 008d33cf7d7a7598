"""ExpertStats: which experts of a mixture the tokens of an engine went to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Counters since the weights were loaded; empty for models without experts, and while there are no weights.

    `num_tokens[layer][expert]` counts the tokens that an expert was chosen for, of all experts, wherever they are. A
    token counts each time that it is computed.
    """

    num_tokens: tuple[tuple[int, ...], ...] = ()

    @property
    def imbalance(self) -> float:
        """How many times the tokens of an even share the busiest expert of a layer gets, mean over layers.

        1.0 is even, and what a model without experts has; the number of experts over those of a token is the most.
        """
        shares = [max(layer) * len(layer) / sum(layer) for layer in self.num_tokens if sum(layer)]
        return sum(shares) / len(shares) if shares else 1.0
