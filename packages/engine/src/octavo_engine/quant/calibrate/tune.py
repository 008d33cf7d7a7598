"""tune: goes on from rounded linears, and makes the whole model foretell what it did before they were rounded.

GPTQ rounds one linear after the other, each for its own outputs. Here scales and norms are learnt together, by what
they do to the distribution of next tokens (a student distilled from the model itself), as in EfficientQAT (arXiv
2407.11062, section 3.3) and Norm Tweaking (2309.02784); where `TuneSettings.reach` allows it, codes too (AutoRound,
2309.05516).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo_engine.models.config import ModelConfig
from octavo_engine.quant.calibrate.divergence import divergence
from octavo_engine.quant.calibrate.grid import Codes
from octavo_engine.quant.calibrate.options import TUNED_ROWS, QuantizeOptions
from octavo_engine.quant.calibrate.plain import PlainDecoder
from octavo_engine.quant.calibrate.trained import Moments, TrainedCodes
from octavo_engine.weights.source import Source

_SEED = 1
_WARM_UP = 0.1  # of all steps; afterwards rates fall to 0, step by step


class TuneSettings(NamedTuple):
    """How far steps go.

    num_steps: of `TUNED_ROWS` sequences each.
    reach: how far a weight can go in all steps, in steps between codes; 0 leaves all codes as they are. With few steps
        many codes change at once, and the model is lost: 0.5 in 16 steps did that.
    scale_rate: how far a scale or a norm's weight goes in one step at most, as a share of it.
    """

    num_steps: int
    reach: float = 0.0
    scale_rate: float = 1e-3


class Tuned(NamedTuple):
    """codes: of the linears, by their names without `.weight`. norms: their weights by their names, fp32."""

    codes: dict[str, Codes]
    norms: dict[str, Tensor]


def tune(
    source: Source,
    rounded: Mapping[str, Codes],
    sequences: Sequence[Sequence[int]],
    options: QuantizeOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Learn scales and norms of a model whose linears are rounded.

    The model's own weights are read anew. About 20 bytes are held for each of a linear's weights, and 10 for each logit
    of 512 tokens.

    Args:
        source: the model, not quantised, without experts.
        rounded: its linears, by their names without `.weight`; not modified.
        sequences: token ids of the calibration text, of one length.
        options: `tune_steps` says how many.
        progress: called after each step.

    """
    tuner = Tuner(
        source.config,
        {name: weight.float() if isinstance(weight, Tensor) else weight.values() for name, weight in source.weights()},
        rounded,
        sequences,
        TuneSettings(options.tune_steps),
        product_dtype(),
    )
    for done in range(options.tune_steps):
        tuner.step()
        if progress is not None:
            progress("steps", done + 1, options.tune_steps)
    return Tuned(tuner.codes(), tuner.norms())


def product_dtype() -> torch.dtype:
    """Return what products are fastest in here and exact enough to learn by: bfloat16 where a CPU has tiles of it."""
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


class Tuner:
    """Learns codes, scales and norms of one model.

    Args:
        config: the model's.
        weights: the model's, by the checkpoint's names, fp32; not modified.
        rounded: its linears' codes, by their names without `.weight`.
        sequences: token ids to learn by, of one length.
        settings: how far steps go.
        dtype: of products; see `product_dtype`.

    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        rounded: Mapping[str, Codes],
        sequences: Sequence[Sequence[int]],
        settings: TuneSettings,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._settings = settings
        self._sequences = torch.tensor([list(ids) for ids in sequences])
        self._matrices = {
            name: TrainedCodes(codes, weights[f"{name}.weight"], dtype) for name, codes in rounded.items()
        }
        names = [name for name in weights if name.endswith("norm.weight")]
        self._norms = {name: weights[name].clone().requires_grad_() for name in names}
        self._moments = {name: Moments(weight.detach()) for name, weight in self._norms.items()}
        teacher = {
            name: weight.to(dtype) if name.removesuffix(".weight") in rounded else weight
            for name, weight in weights.items()
        }
        own = {f"{name}.weight": matrix.weight for name, matrix in self._matrices.items()}
        self._teacher = PlainDecoder(config, teacher)
        self._student = PlainDecoder(config, {**teacher, **own, **self._norms})
        self._head = self._teacher.head().to(dtype)
        self._generator = torch.Generator().manual_seed(_SEED)
        self._left = torch.empty(0, dtype=torch.int64)
        self.num_steps_done = 0

    def step(self) -> float:
        """Learn by the next sequences; return the divergence from the model before this step."""
        token_ids = self._next_sequences()
        with torch.no_grad():
            target = self._teacher(token_ids)
        with torch.enable_grad():
            hidden = self._student(token_ids)
        with torch.no_grad():
            found = divergence(hidden, target, self._head)
        torch.autograd.backward(hidden, found.gradient)
        with torch.no_grad():
            self._follow()
        self.num_steps_done += 1
        return found.mean

    def divergence(self, sequences: Sequence[Sequence[int]]) -> float:
        """Return the mean divergence of next tokens on sequences of one length, in nats."""
        total = 0.0
        with torch.no_grad():
            for ids in sequences:
                token_ids = torch.tensor([list(ids)])
                total += divergence(self._student(token_ids), self._teacher(token_ids), self._head).mean
        return total / len(sequences)

    def codes(self) -> dict[str, Codes]:
        """Return the linears as they are now."""
        return {name: matrix.codes() for name, matrix in self._matrices.items()}

    def norms(self) -> dict[str, Tensor]:
        """Return the norms' weights as they are now, by their names, fp32."""
        return {name: weight.detach() for name, weight in self._norms.items()}

    def _follow(self) -> None:
        settings, done = self._settings, self.num_steps_done
        share = min(1.0, (done + 1) / (_WARM_UP * settings.num_steps)) * (1 - done / settings.num_steps)
        rate = 2 * settings.reach / settings.num_steps  # whose mean over all steps is half of it
        for matrix in self._matrices.values():
            matrix.step(rate * share, settings.scale_rate * share)
        for name, weight in self._norms.items():
            assert weight.grad is not None
            direction = self._moments[name].direction(weight.grad)
            weight.data.sub_(direction.mul_(weight.abs().mean()), alpha=settings.scale_rate * share)
            weight.grad = None

    def _next_sequences(self) -> Tensor:
        """Return sequences in an order drawn anew each time that all were had: [rows, length]."""
        if len(self._left) < min(TUNED_ROWS, len(self._sequences)):
            drawn = torch.randperm(len(self._sequences), generator=self._generator)
            self._left = torch.cat([self._left, drawn])
        chosen, self._left = self._left[:TUNED_ROWS], self._left[TUNED_ROWS:]
        return self._sequences[chosen]
