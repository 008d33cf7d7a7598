"""walk: leads several batches through a model side by side, with a halt at every linear."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.models.registry import Model
from octavo_engine.quant.calibrate.observed import Observed
from octavo_engine.quant.calibrate.statistics import InputStatistics
from octavo_engine.quant.unquantized import DenseParameters
from octavo_engine.runner.model_input import ModelInput


class Halt(NamedTuple):
    """A linear, by the name that its shards' begin with, and what each batch is about to give it.

    prefix: such as `model.layers.0.self_attn.`. shards: the checkpoint's linears in it, with their rows.
    inputs: of each batch, [num_tokens, in_features].
    """

    prefix: str
    shards: tuple[tuple[str, int], ...]
    parameters: DenseParameters
    inputs: list[Tensor]

    def statistics(self, length: int) -> InputStatistics:
        """Return what inputs of sequences of a length are like; where attention projects, first tokens count more."""
        is_attention = self.shards[0][0] == "q_proj"
        return InputStatistics.of(self.inputs, length=length if is_attention else None)


def walk(model: Model, quant: Observed, batches: Sequence[ModelInput]) -> Generator[Halt, None, None]:
    """Run batches through a model, and yield each of its linears when all of them have come to it.

    Whoever takes a halt may write to the linear's weight: the batches go on with what it then is. So a linear can be
    rounded by inputs that come out of rounded ones, and each product is made once.

    Args:
        model: made with `quant`.
        quant: how its matrices are held; its observer is set.
        batches: what to run.

    """
    known = {id(linear.parameters): (prefix, linear) for prefix, linear in model.linears()}
    steps = [_Steps(model, batch) for batch in batches]
    try:
        while True:
            stopped = []
            for step in steps:  # one at a time: the others wait
                quant.observer = step.observer(known)
                stopped.append(step.go_on())
            first, *_ = stopped
            if first is None:
                return
            prefix, linear = known[id(first[0])]
            shards = tuple((shard.name, shard.num_rows) for shard in linear.shards)
            yield Halt(prefix, shards, first[0], [found[1] for found in stopped if found is not None])
    finally:
        quant.observer = None
        for step in steps:
            step.end()


_Stop = tuple[DenseParameters, Tensor]


class _Ended(BaseException):
    """Leads a thread that is no longer wanted out of the model."""


class _Steps:
    """One batch on its way, in a thread of its own that runs while somebody waits in `go_on`."""

    def __init__(self, model: Model, batch: ModelInput) -> None:
        self._model = model
        self._batch = batch
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._stop: _Stop | None = None
        self._error: BaseException | None = None
        self._is_wanted = True
        self._thread = threading.Thread(target=self._run, name="octavo-walk", daemon=True)
        self._thread.start()

    def observer(self, known: Container[int]) -> Callable[[DenseParameters, Tensor], None]:
        """Return what halts this batch at each linear that is known; others, such as the head, let it pass."""

        def halt(parameters: DenseParameters, x: Tensor) -> None:
            if id(parameters) in known:
                self._stop = parameters, x
                self._wait()

        return halt

    def go_on(self) -> _Stop | None:
        """Let it run to the next linear; None is the end of the model. Raises what it raises."""
        self._stop = None
        self._may_go.release()
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def end(self) -> None:
        """End the thread, wherever it is."""
        self._is_wanted = False
        self._may_go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._has_stopped.release()
        self._may_go.acquire()
        if not self._is_wanted:
            raise _Ended

    def _run(self) -> None:
        self._may_go.acquire()
        try:
            if self._is_wanted:
                with torch.inference_mode():
                    self._model(self._batch)
        except _Ended:
            pass
        except BaseException as error:  # raised again where somebody waits
            self._error = error
        self._has_stopped.release()
