"""Random requests: everything that a caller can ask for, mixed, as a function of a seed."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from octavo_engine import BeamSearchParams, SamplingParams, StructuredOutputsParams
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import Pooling

MAX_PROMPT_TOKENS = 120
MAX_BEAM_WIDTH = 4
MAX_SAMPLES = 4
STOPS = ("\n", ". ", " the", "e", "ing ")
BAD_WORDS = (" the", "and", "\n\n")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"choice": ["red", "green", "dark blue", "dark green"]},
    {"regex": "[a-z]{2,9} [0-9]{1,4}"},
    {"json": PERSON},
    {"json": {"enum": ["a long text without a choice", "a long text without end"]}},
    {"grammar": 'start: "the " ("cat" | "dog") (" and " /[a-z]{1,6}/)*'},
)


@dataclass(frozen=True, slots=True)
class Twig:
    """A branch off a request that is kept: where it begins, as a share of the parent's output, and what it wants."""

    share: float
    continuation: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller wants. `params` None asks for an embedding; `index` says which sample the twigs go on from."""

    prompt: tuple[int, ...]
    params: SamplingParams | BeamSearchParams | None
    pooling: Pooling = "last"
    salt: bytes = b""
    priority: int = 0
    index: int = 0
    twigs: tuple[Twig, ...] = ()


class RandomAsks:
    """Draws requests.

    Prompts begin alike in a few ways, so that there is something to share, and are cut out of real text.

    Args:
        rng: where the choices come from.
        text: of the model.
        max_tokens: the most tokens that a sequence generates.
        share_long: of samples that generate half as many at least; several of these outgrow a small pool.
    """

    def __init__(self, rng: random.Random, text: TextProcessor, *, max_tokens: int, share_long: float = 0.3) -> None:
        self._rng = rng
        self._ids = text.encode_prompt("\n".join(inspect.getsource(m) for m in (textwrap, json)))
        self._vocab_size = text.vocab_size
        self._max_tokens = max_tokens
        self._kinds = (share_long, 0.3 * (1 - share_long), 0.7 * (1 - share_long))
        self._stems = [self._cut(rng.choice((8, 15, 16, 17, 33, 64, 90))) for _ in range(4)]

    def __iter__(self) -> Iterator[Ask]:
        while True:
            yield self.ask()

    def ask(self) -> Ask:
        """Draw one of any kind."""
        pick = self._rng
        common: dict[str, Any] = {
            "salt": pick.choice((b"", b"", b"", b"one", b"two")),
            "priority": pick.choice((0, 0, 1)),
        }
        kind = pick.random()
        if kind < 0.1:
            return Ask(self._prompt(), None, pooling=pick.choice(("last", "mean")), **common)
        if kind < 0.25:
            return Ask(self._prompt(), self._beams(), **common)
        ranks = pick.random() < 0.1
        params = self.sampling(ranks=ranks)
        if ranks or pick.random() < 0.75:
            return Ask(self._prompt(), params, **common)
        twigs = tuple(
            Twig(pick.random(), self._cut(pick.choice((0, 0, 1, 5))), self.sampling())
            for _ in range(pick.randint(1, 2))
        )
        return Ask(self._prompt(), params, index=pick.randrange(params.n), twigs=twigs, **common)

    def sampling(self, *, ranks: bool = False) -> SamplingParams:
        """Draw how tokens are chosen; with `ranks` the best of several samples."""
        pick = self._rng
        temperature = pick.choice((0.7, 1.0, 1.4)) if ranks else pick.choice((0.0, 0.0, 0.7, 1.0, 1.4))
        n = pick.choice((1, 1, 1, 2, 3, MAX_SAMPLES))
        options: dict[str, Any] = {"n": n, "temperature": temperature, "seed": pick.getrandbits(40)}
        options["max_tokens"] = pick.randint(1, 10)
        if ranks:
            options["n"], options["best_of"] = 1, 3
        if temperature:
            options |= self._distribution()
        match pick.choices(("long", "constrained", "ending"), self._kinds)[0]:
            case "long":
                options |= {"max_tokens": pick.randint(self._max_tokens // 2, self._max_tokens), "ignore_eos": True}
            case "constrained":
                options["structured_outputs"] = StructuredOutputsParams(**pick.choice(CONSTRAINTS))
            case "ending":
                options |= self._ends(options["max_tokens"])
        options |= self._changes()
        options |= self._reports()
        options["output_kind"] = "final" if ranks else pick.choice(("delta", "delta", "cumulative", "final"))
        return SamplingParams(**options)

    def _distribution(self) -> dict[str, Any]:
        pick = self._rng
        filters: dict[str, Any] = {}
        if self._chance(0.15):
            return {"mirostat_mode": pick.choice((1, 2)), "mirostat_tau": pick.choice((2.0, 4.0))}
        if self._chance(0.3):
            filters["top_p"] = pick.choice((0.5, 0.9, 0.99))
        if self._chance(0.3):
            filters["top_k"] = pick.choice((1, 7, 50, 2000))
        if self._chance(0.2):
            filters["min_p"] = pick.choice((0.02, 0.2))
        if self._chance(0.1):
            filters["typical_p"] = pick.choice((0.3, 0.9))
        if self._chance(0.1):
            filters |= {"xtc_probability": 0.5, "xtc_threshold": 0.05}
        return filters

    def _changes(self) -> dict[str, Any]:
        pick = self._rng
        changes: dict[str, Any] = {}
        if self._chance(0.2):
            changes |= {
                "repetition_penalty": 1.2,
                "presence_penalty": pick.choice((-0.5, 0.7)),
                "frequency_penalty": 0.3,
            }
        if self._chance(0.15):
            changes |= {"dry_multiplier": 1.5, "dry_allowed_length": pick.choice((1, 2))}
        if self._chance(0.15):
            changes["logit_bias"] = {token_id: pick.uniform(-5, 5) for token_id in self._some_ids(20)}
        if self._chance(0.1):
            changes["bad_words"] = pick.sample(BAD_WORDS, 2)
        if self._chance(0.05):
            changes["logits_processors"] = (lean_to_low_ids,)
        return changes

    def _ends(self, max_tokens: int) -> dict[str, Any]:
        pick = self._rng
        ends: dict[str, Any] = {"ignore_eos": self._chance(0.5), "skip_special_tokens": self._chance(0.8)}
        if self._chance(0.3):
            ends |= {"stop": pick.sample(STOPS, pick.randint(1, 2)), "include_stop_str_in_output": self._chance(0.5)}
        if self._chance(0.2):
            ends["stop_token_ids"] = self._some_ids(8)
        if self._chance(0.2):
            ends["min_tokens"] = pick.randint(0, max_tokens)
        if self._chance(0.06):
            ends["allowed_token_ids"] = self._some_ids(40)
        return ends

    def _reports(self) -> dict[str, Any]:
        pick = self._rng
        reports: dict[str, Any] = {}
        if self._chance(0.4):
            reports |= {"logprobs": pick.choice((0, 1, 5, 20)), "logprobs_mode": pick.choice(("raw", "processed"))}
        if self._chance(0.02):  # the whole vocabulary is told for each token
            reports |= {"logprobs": -1, "max_tokens": 1, "min_tokens": 0}
        if self._chance(0.1):
            reports["logprob_token_ids"] = self._some_ids(3)
        if self._chance(0.15):
            reports["prompt_logprobs"] = pick.choice((0, 2, 10))
        return reports

    def _beams(self) -> BeamSearchParams:
        pick = self._rng
        width, max_tokens = pick.randint(1, MAX_BEAM_WIDTH), pick.randint(1, 12)
        options: dict[str, Any] = {
            "beam_width": width,
            "max_tokens": max_tokens,
            "length_penalty": pick.choice((0.0, 1.0, 2.0)),
            "early_stopping": pick.choice((True, False, "never")),
            "num_return_sequences": pick.randint(1, width),
            "logprobs": pick.choice((None, 0, 3)),
        }
        if self._chance(0.2):
            options["structured_outputs"] = StructuredOutputsParams(**pick.choice(CONSTRAINTS))
        else:
            options |= self._ends(max_tokens)
        return BeamSearchParams(**options, **self._changes())

    def _prompt(self) -> tuple[int, ...]:
        stem = self._rng.choice(self._stems)[: self._rng.randint(1, 90)]
        return (*stem, *self._cut(self._rng.choice((0, 1, 3, 20, 30))))

    def _cut(self, num_tokens: int) -> tuple[int, ...]:
        start = self._rng.randrange(len(self._ids) - num_tokens)
        return tuple(self._ids[start : start + num_tokens])

    def _some_ids(self, count: int) -> list[int]:
        return [self._rng.choice(self._ids) for _ in range(count - 1)] + [self._rng.randrange(self._vocab_size)]

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability


def lean_to_low_ids(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Prefer low token ids, the more the longer the text is: a function that a request brings."""
    return logits - torch.arange(len(logits)) * (1e-4 * len(token_ids))
