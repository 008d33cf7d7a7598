"""SamplingParams: how the tokens of one request are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_checks import (
    check_choice,
    check_float,
    check_int,
    checked_bias,
    checked_ids,
    checked_list,
    checked_strings,
)
from octavo_engine.structured.params import StructuredOutputsParams

MAX_STOP_STRINGS = 16
MAX_LIST_ITEMS = 1024
MAX_LOGIT_BIAS = 100.0
DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")
_SEED_MIN, _SEED_MAX = -(1 << 63), (1 << 63) - 1
_MAX_VOCABULARY = 1 << 24

OutputKind = Literal["delta", "cumulative", "final"]

LogitsProcessor = Callable[[list[int], Any], Any]
"""(token ids so far, logits [vocab_size] as a torch tensor) -> the logits to draw from; None if changed in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen; docs/sampling.md says what each field means.

    Temperature 0 is greedy. With a seed, the tokens depend on the seed, the prompt and the parameters alone; an unset
    seed is drawn at submission. `top_k` 0 (or -1) and `max_tokens` None mean no limit of that kind: `max_tokens` None
    uses the room that is left in the context. `bad_words` and `dry_sequence_breakers` are strings, which become
    `bad_words_ids` and `dry_breaker_ids`, beside those given, when a request is made.

    Raises:
        InvalidRequest: if a value is out of range, not finite, or contradicts another one; names the parameter.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: Sequence[str] = DRY_SEQUENCE_BREAKERS
    dry_breaker_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    logprob_token_ids: Sequence[int] = ()
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    truncate_prompt_tokens: int | None = None
    output_kind: OutputKind = "delta"

    def __post_init__(self) -> None:
        if self.top_k == -1:
            self._set("top_k", 0)
        self._check_amounts()
        self._check_draw()
        self._check_penalties()
        self._check_lists()
        self._check_together()

    @property
    def greedy(self) -> bool:
        """True if the arg-max is taken and no noise is drawn."""
        return self.temperature == 0.0

    @property
    def wants_logprobs(self) -> bool:
        """True if log-probabilities of drawn tokens are needed."""
        return self.reports_logprobs or self.ranks

    @property
    def reports_logprobs(self) -> bool:
        """True if the answer has log-probabilities of drawn tokens."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def ranks(self) -> bool:
        """True if more sequences run than are returned."""
        return self.num_sequences > self.n

    @property
    def num_sequences(self) -> int:
        """Sequences that run for the request."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whichever form they were given in."""
        return tuple(self.stop)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_amounts(self) -> None:
        check_int("n", self.n, 1)
        check_int("best_of", self.best_of, 1, optional=True)
        check_int("seed", self.seed, _SEED_MIN, _SEED_MAX, optional=True)
        check_int("max_tokens", self.max_tokens, 1, optional=True)
        check_int("min_tokens", self.min_tokens, 0)
        check_int("logprobs", self.logprobs, -1, optional=True)
        check_choice("logprobs_mode", self.logprobs_mode, ("raw", "processed"))
        check_int("prompt_logprobs", self.prompt_logprobs, -1, optional=True)
        check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "truncate_prompt_tokens must be at least 1, or -1 for what the context has room for, got 0",
                param="truncate_prompt_tokens",
            )
        check_choice("output_kind", self.output_kind, ("delta", "cumulative", "final"))

    def _check_draw(self) -> None:
        check_float("temperature", self.temperature, 0.0, 2.0)
        check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_int("top_k", self.top_k, 0)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("typical_p", self.typical_p, 0.0, 1.0, low_open=True)
        check_float("xtc_probability", self.xtc_probability, 0.0, 1.0)
        check_float("xtc_threshold", self.xtc_threshold, 0.0, 1.0, low_open=True)
        check_choice("mirostat_mode", self.mirostat_mode, (0, 1, 2))
        check_float("mirostat_tau", self.mirostat_tau, 0.0, 100.0, low_open=True)
        check_float("mirostat_eta", self.mirostat_eta, 0.0, 1.0, low_open=True)

    def _check_penalties(self) -> None:
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        check_float("dry_multiplier", self.dry_multiplier, 0.0, 100.0)
        check_float("dry_base", self.dry_base, 1.0, 100.0)
        check_int("dry_allowed_length", self.dry_allowed_length, 1)

    def _check_lists(self) -> None:
        """Check lists, and keep them as tuples."""
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for name, most in (
            ("stop", MAX_STOP_STRINGS),
            ("bad_words", MAX_LIST_ITEMS),
            ("dry_sequence_breakers", MAX_LIST_ITEMS),
        ):
            self._set(name, checked_strings(name, getattr(self, name), most))
        for name in ("stop_token_ids", "dry_breaker_ids", "logprob_token_ids"):
            self._set(name, checked_ids(name, getattr(self, name), _MAX_VOCABULARY))
        self._set("logit_bias", checked_bias("logit_bias", self.logit_bias, MAX_LOGIT_BIAS, MAX_LIST_ITEMS))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", checked_ids("allowed_token_ids", self.allowed_token_ids, _MAX_VOCABULARY))
        sequences = checked_list("bad_words_ids", self.bad_words_ids, 2 * MAX_LIST_ITEMS)
        self._set("bad_words_ids", tuple(checked_ids("bad_words_ids", ids, MAX_LIST_ITEMS) for ids in sequences))
        processors = checked_list("logits_processors", self.logits_processors, MAX_LIST_ITEMS)
        self._set("logits_processors", processors)
        if not all(map(callable, processors)):
            raise InvalidRequest("logits_processors must hold functions", param="logits_processors")

    def _check_together(self) -> None:
        """Refuse values that contradict each other."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower min_tokens",
                param="min_tokens",
            )
        if not all(self.bad_words_ids):
            raise InvalidRequest("bad_words_ids holds an empty list; give token ids or leave it out",
                                 param="bad_words_ids")  # fmt: skip
        if self.allowed_token_ids is not None:
            banned = {ids[0] for ids in self.bad_words_ids if len(ids) == 1}
            if banned.issuperset(self.allowed_token_ids):
                raise InvalidRequest(
                    "allowed_token_ids leaves no token that bad_words_ids does not ban; allow another one",
                    param="allowed_token_ids",
                )
        if self.num_sequences < self.n:
            raise InvalidRequest(f"best_of {self.best_of} is less than n {self.n}; raise it", param="best_of")
        if self.ranks and self.greedy:
            raise InvalidRequest("best_of needs a temperature above 0: greedy sequences are equal", param="best_of")
        if self.ranks and self.output_kind == "cumulative":
            raise InvalidRequest(
                "the best sequences are known at the end alone; leave out output_kind, or best_of", param="output_kind"
            )
        if self.mirostat_mode:
            self._check_mirostat_alone()
        if self.structured_outputs is not None:
            self._check_structured_outputs()

    def _check_structured_outputs(self) -> None:
        """Refuse what would keep a text from ending where its grammar ends."""
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise InvalidRequest(
                f"structured_outputs must be StructuredOutputsParams, got {type(self.structured_outputs).__name__}",
                param="structured_outputs",
            )
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                raise InvalidRequest(f"{name} contradicts structured_outputs, whose grammar says where the text ends;"
                                     f" leave {name} out", param=name)  # fmt: skip

    def _check_mirostat_alone(self) -> None:
        others = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "xtc_probability": 0.0}
        set_too = [name for name, off in others.items() if getattr(self, name) != off]
        if set_too:
            raise InvalidRequest(
                f"mirostat_mode chooses by itself how many tokens are left; leave out {', '.join(set_too)}",
                param="mirostat_mode",
            )
        if self.greedy:
            raise InvalidRequest("mirostat_mode needs a temperature above 0; raise it", param="mirostat_mode")
