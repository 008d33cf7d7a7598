"""Builds an engine in this process out of a configuration. Importing this module loads no torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from octavo_engine.config import EngineConfig
from octavo_engine.opening import opening
from octavo_engine.weights.source import open_source

if TYPE_CHECKING:
    from octavo_engine.assembly import BuiltEngine
    from octavo_engine.weights.load import Progress


def build_engine(config: EngineConfig, progress: Progress | None = None) -> BuiltEngine:
    """Load a model and set up everything it needs to serve requests.

    Args:
        config: what the user chose.
        progress: called with the number of weights loaded and their total.

    Raises:
        ModelNotFound, CorruptModelFile, UnsupportedModel: if the model cannot be loaded; says which file and why.
        InvalidConfig: if the settings do not fit the model or the memory.
    """
    started = time.monotonic()
    with opening(open_source(config.model)) as opened:
        from octavo_engine.placement import place_engine  # imports torch, while the model is read

        return place_engine(config, opened, progress, started)
