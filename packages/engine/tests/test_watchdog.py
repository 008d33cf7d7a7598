"""The watchdog: what it takes for stuck, what it says of it, and that it forgives."""

import asyncio
import logging
import threading

import pytest

from octavo_engine.async_engine import AsyncEngine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineStuck, InvalidConfig
from octavo_engine.watchdog import Watchdog


class Engine:
    now, steps = 0.0, None

    def __init__(self):
        self.watchdog = Watchdog(lambda: self.steps, 10.0, lambda: self.now)

    def look(self, seconds):
        self.now += seconds
        self.watchdog.look()

    def is_stuck(self):
        try:
            self.watchdog.check()
        except EngineStuck:
            return True
        return False


def test_an_engine_that_has_nothing_to_do_is_well():
    engine = Engine()
    for _ in range(5):
        engine.look(100)
    assert not engine.is_stuck()


def test_an_engine_that_makes_steps_is_well():
    engine = Engine()
    for engine.steps in range(20):
        engine.look(9)
        assert not engine.is_stuck()


def test_time_without_work_does_not_count():
    engine = Engine()
    engine.look(100)
    engine.steps = 5
    engine.look(100)
    engine.look(9)
    assert not engine.is_stuck()


def test_without_a_step_the_log_has_all_stacks_once_and_it_recovers(caplog):
    engine = Engine()
    engine.steps = 3
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            engine.look(6)
        assert engine.is_stuck()
        (record,) = caplog.records
        assert "no step for 12.0 s" in record.getMessage()
        assert "test_without_a_step" in record.getMessage()
        with pytest.raises(EngineStuck, match="no step for 24 s"):
            engine.watchdog.check()
        engine.steps = 4
        engine.look(6)
        assert not engine.is_stuck()
        assert "goes on after 30.0 s" in caplog.records[-1].getMessage()
        for _ in range(5):  # and again
            engine.look(6)
        assert engine.is_stuck()
        assert len(caplog.records) == 3


class Scheduler:
    class counters:  # noqa: N801  # an instance's name
        num_steps = 0


class HangingEngine:
    """An engine whose step waits until it is let go."""

    def __init__(self):
        self.scheduler, self.standby = Scheduler(), None
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.has_work = False

    def check_ranks(self):
        pass

    def step(self):
        self.entered.set()
        self.go_on.wait(10)
        self.scheduler.counters.num_steps += 1
        self.has_work = False
        return []

    def close(self):
        pass


def test_a_step_that_hangs_makes_the_engine_unhealthy_until_it_ends():
    engine = HangingEngine()
    front = AsyncEngine(engine, None, None, watchdog_timeout=0.05)
    try:
        front.check_health()
        front._commands.do(lambda: setattr(engine, "has_work", True))
        assert engine.entered.wait(5)
        _wait_until(lambda: _fails(front))
        engine.go_on.set()
        _wait_until(lambda: not _fails(front))
    finally:
        engine.go_on.set()
        front.close()


def _fails(front):
    try:
        front.check_health()
    except EngineStuck:
        return True
    return False


def _wait_until(condition):
    async def wait():
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    asyncio.run(wait())


def test_a_limit_that_is_no_time_is_refused():
    with pytest.raises(InvalidConfig, match="watchdog_timeout must be above 0 seconds, got 0"):
        EngineConfig(watchdog_timeout=0)
