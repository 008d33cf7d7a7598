"""TimedCalls: calls that may take too long, each in a thread of its own, so that one that does holds up no other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from octavo_engine.errors import EngineBusy

T = TypeVar("T")


class TimedCalls:
    """Runs calls that cannot be stopped: one that runs out of time is left to end by itself.

    Args:
        time_budget: seconds that a call may take.
        max_num_running: calls that may run at once, those left to themselves included.
    """

    def __init__(self, time_budget: float, max_num_running: int) -> None:
        self.time_budget = time_budget
        self._slots = threading.Semaphore(max_num_running)

    def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns, or raise what it raises.

        Raises:
            EngineBusy: too many others run, and none of them ended in time.
            TimeoutError: the call takes longer than it may.
        """
        if not self._slots.acquire(timeout=self.time_budget):
            raise EngineBusy(f"other calls have taken all threads for {self.time_budget:g} s; try again later")
        result: Future[T] = Future()

        def work() -> None:
            try:
                result.set_result(call())
            except Exception as error:
                result.set_exception(error)
            finally:
                self._slots.release()

        threading.Thread(target=work, name="octavo-timed-call", daemon=True).start()
        return result.result(self.time_budget)
