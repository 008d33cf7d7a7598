"""AsyncCommands: an engine that ends while it is asked."""

import asyncio

import pytest

from octavo_engine.async_commands import AsyncCommands
from octavo_engine.errors import EngineDead


def test_an_engine_that_ends_before_the_question_stands_there_is_an_error() -> None:
    """Its thread takes no more commands, so nothing else would end the wait."""
    healthy = iter([True])

    def check_health() -> None:
        if not next(healthy, False):
            raise EngineDead("the engine has ended")

    async def ask() -> None:
        async with asyncio.timeout(5):
            await AsyncCommands(check_health).ask(lambda: None)

    with pytest.raises(EngineDead, match="has ended"):
        asyncio.run(ask())
