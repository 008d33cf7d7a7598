"""expert_stats: what the mixtures of a model have counted."""

from __future__ import annotations

from octavo_engine.expert_stats import ExpertStats
from octavo_engine.models.registry import Model
from octavo_engine.runner.model_host import LocalModel


def expert_stats(model: Model) -> ExpertStats:
    """Return which experts the tokens went to; on a GPU this waits for the steps that were launched."""
    return ExpertStats(tuple(tuple(mixture.load.num_tokens.tolist()) for _, mixture in model.mixtures()))


def expert_stats_of(host: LocalModel) -> ExpertStats:
    """Return the same of the model that is in memory now, if one is."""
    return ExpertStats() if host.weights is None else expert_stats(host.weights.model)


def clear_expert_loads(model: Model) -> None:
    """Begin counting anew, after a step that no request asked for."""
    for _, mixture in model.mixtures():
        mixture.load.clear()
