"""SamplingParams: how the tokens of one request are chosen."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_checks import check_float, check_int

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
_SEED_MIN, _SEED_MAX = -(1 << 63), (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Temperature 0 is greedy. With a seed, the tokens depend on the seed, the prompt and the parameters alone; an unset
    seed is drawn at submission. `top_k` 0 (or -1) and `max_tokens` None mean no limit of that kind: `max_tokens` None
    uses the room that is left in the context.

    Raises:
        InvalidRequest: if a value is out of range, not finite, or contradicts another one; names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | SequenceABC[str] = ()
    stop_token_ids: SequenceABC[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_ranges()
        self._check_stops()

    def _check_ranges(self) -> None:
        check_int("n", self.n, 1, None)
        check_float("temperature", self.temperature, 0.0, 2.0)
        check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_int("top_k", self.top_k, 0, None)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        check_int("seed", self.seed, _SEED_MIN, _SEED_MAX)
        check_int("max_tokens", self.max_tokens, 1, None)
        check_int("min_tokens", self.min_tokens, 0, None)
        check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower min_tokens",
                param="min_tokens",
            )

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings, at most {MAX_STOP_STRINGS} are taken", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(f"stop must hold non-empty strings, got {text!r}", param="stop")
        for token_id in self.stop_token_ids:
            check_int("stop_token_ids", token_id, 0, None)

    @property
    def greedy(self) -> bool:
        """True if the arg-max is taken and no noise is drawn."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whichever form they were given in."""
        return tuple(self.stop)
