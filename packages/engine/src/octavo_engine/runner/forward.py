"""Forward passes: a model as it is, op by op, or recorded as one native program."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from octavo_engine.models.registry import Model
from octavo_engine.quant.choose import native_isa
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import ModelInput
from octavo_kernels import NotRecordable, Recording

_log = logging.getLogger(__name__)

Forward = Callable[[ModelInput], Tensor]
"""From a step's input to its hidden states [num_tokens, hidden_size], which hold until the next step."""


def make_forward(model: Model, inputs: InputBuilder, device: torch.device) -> Forward:
    """Return the fastest way to run a model: recorded where its ops run in native CPU code, else the model itself."""
    if device.type != "cpu" or native_isa() is None:
        return model
    try:
        return RecordedForward(model, inputs)
    except NotRecordable as error:
        _log.info("the model runs op by op: %s", error)
        return model


class RecordedForward:
    """Runs a model by one native call per step, on the buffers of the InputBuilder that makes its inputs.

    Raises:
        NotRecordable: if a part of the model computes with torch.
    """

    def __init__(self, model: Model, inputs: InputBuilder) -> None:
        largest = inputs.largest()
        with torch.inference_mode(), Recording(len(largest.token_ids)) as recording:
            self._hidden = model(largest)
        self._program = recording.program

    def __call__(self, model_input: ModelInput) -> Tensor:
        """Run a step whose input the builder has just made."""
        num_tokens = len(model_input.token_ids)
        self._program.run(num_tokens, len(model_input.seq_lens))
        return self._hidden[:num_tokens]
