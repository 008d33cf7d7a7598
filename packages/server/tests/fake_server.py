"""Runs the `octavo` command on the fake engine, for tests that stop it; HOLD_AFTER may hold requests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import FakeEngine

from octavo_engine.async_engine import AsyncEngine
from octavo_server.cli import main


def load(config: object, progress: object = None) -> FakeEngine:
    engine = FakeEngine()
    engine.hold_after = int(os.environ["HOLD_AFTER"]) if "HOLD_AFTER" in os.environ else None
    return engine


if __name__ == "__main__":
    AsyncEngine.from_config = staticmethod(load)  # type: ignore[method-assign, assignment]
    main()
