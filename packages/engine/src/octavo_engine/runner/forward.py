"""Forward: how a model is run in a step, op by op or as one native program recorded beforehand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.models.registry import Model
from octavo_engine.quant.choose import native_isa
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import ModelInput
from octavo_kernels import NotRecordable, Recording, native_threads

_log = logging.getLogger(__name__)


class Likeliest(NamedTuple):
    """The arg-max of each token's logits on the host, which holds until the next step.

    Attributes:
        token_ids: [num_tokens] int64, the lowest of equals.
        logits: [num_tokens] fp32; NaN if any logit of the row is.
    """

    token_ids: NDArray[np.int64]
    logits: NDArray[np.float32]


class Forward(Protocol):
    """Runs a model on the inputs that an InputBuilder has just made."""

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Return the hidden states [num_tokens, hidden_size], which hold until the next step."""
        ...

    def greedy(self, model_input: ModelInput) -> Likeliest:
        """Return what follows each token of a step in which every sequence computes one."""
        ...

    def threads(self) -> AbstractContextManager[None]:
        """Return what to open around a step, so that its threads do not get into each other's way."""
        ...


def make_forward(model: Model, inputs: InputBuilder, device: torch.device) -> Forward:
    """Return the fastest way to run a model: recorded where its ops run in native CPU code, else op by op."""
    if device.type == "cpu" and native_isa() is not None:
        try:
            return RecordedForward(model, inputs)
        except NotRecordable as error:
            _log.info("the model runs op by op: %s", error)
    return OpByOp(model, model.greedy)


class OpByOp:
    """Runs a model as it is.

    Args:
        hidden: the model: from a step's input to its hidden states.
        greedy: from hidden states to the arg-max of their logits, and these logits.
    """

    def __init__(
        self, hidden: Callable[[ModelInput], Tensor], greedy: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self._hidden = hidden
        self._greedy = greedy

    @torch.inference_mode()
    def __call__(self, model_input: ModelInput) -> Tensor:
        """Run a step."""
        return self._hidden(model_input)

    @torch.inference_mode()
    def greedy(self, model_input: ModelInput) -> Likeliest:
        """Run a step up to its arg-max."""
        token_ids, logits = self._greedy(self._hidden(model_input))
        return Likeliest(token_ids.cpu().numpy(), logits.cpu().numpy())

    def threads(self) -> AbstractContextManager[None]:
        """Return nothing to open: products are torch's, and have its threads."""
        return nullcontext()


class RecordedForward:
    """Runs a model by one native call per step, on the buffers of the InputBuilder that makes its inputs.

    Raises:
        NotRecordable: if a part of the model computes with torch.
    """

    def __init__(self, model: Model, inputs: InputBuilder) -> None:
        self._num_threads = torch.get_num_threads()
        largest = inputs.largest()
        with torch.inference_mode():
            with Recording(len(largest.token_ids)) as body:
                self._hidden = model(largest)
            rows = self._hidden[: len(largest.seq_lens)]
            with Recording(len(rows)) as head:
                token_ids, logits = model.greedy(rows)
        self._program = body.program
        self._greedy_program = body.program.then(head.program)
        self._likeliest = Likeliest(token_ids.numpy(), logits.numpy())

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Run a step."""
        num_tokens = len(model_input.token_ids)
        self._program.run(num_tokens, len(model_input.seq_lens))
        return self._hidden[:num_tokens]

    def greedy(self, model_input: ModelInput) -> Likeliest:
        """Run a step up to its arg-max."""
        num_seqs = len(model_input.seq_lens)
        self._greedy_program.run(num_seqs, num_seqs)
        token_ids, logits = self._likeliest
        return Likeliest(token_ids[:num_seqs], logits[:num_seqs])

    def threads(self) -> AbstractContextManager[None]:
        """Give native ops the threads that torch had when the model was recorded, and torch's own ops one."""
        return native_threads(self._num_threads)
