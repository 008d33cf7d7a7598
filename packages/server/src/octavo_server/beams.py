"""Beam search over HTTP: vLLM's fields of a body, and what contradicts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.errors import InvalidRequest
from octavo_engine.text.processor import TextProcessor
from octavo_server.protocol.generation import GenerationBody
from octavo_server.protocol.violations import summarise

_OF_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "xtc_probability": (0,),
    "mirostat_mode": (0,),
    "prompt_logprobs": (),
}
"""Fields that a search does not go by, with the values that mean nothing."""

_DEFAULTS = ("repetition_penalty",)
_PLAIN = (
    "length_penalty",
    "early_stopping",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_sequence_breakers",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "truncate_prompt_tokens",
)


def beam_search_params(
    body: GenerationBody, text: TextProcessor, *, max_n: int, max_tokens: int | None, logprobs: int | None
) -> BeamSearchParams:
    """Return the search that a body with `use_beam_search` asks for: `best_of`, or else `n`, beams; `n` are returned.

    What the body leaves out comes from the model's own defaults, where a search goes by it.

    Raises:
        InvalidRequest: if a value is out of range or belongs to sampling; names it.
    """
    for name, neutral in _OF_SAMPLING.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise InvalidRequest(
                f"{name} does not go with use_beam_search, got {summarise(value)}; leave one of them out", param=name
            )
    num_returned = body.n or 1
    width = getattr(body, "best_of", None) or num_returned
    if width > max_n:
        raise InvalidRequest(f"a search takes at most {max_n} beams here, got {width}", param="best_of")
    if num_returned > width:
        raise InvalidRequest(f"n is {num_returned}, more than best_of {width} beams; raise best_of", param="n")
    chosen = {name: text.default_sampling[name] for name in _DEFAULTS if name in text.default_sampling}
    chosen |= {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
    return BeamSearchParams(
        beam_width=width,
        num_return_sequences=num_returned,
        max_tokens=max_tokens,
        logprobs=logprobs,
        stop=body.stop_strings,
        logit_bias=body.biases,
        structured_outputs=body.constraint,
        **chosen,
    )


def check_beam_fields(body: GenerationBody) -> None:
    """Refuse a search's fields where no search is asked for.

    Raises:
        InvalidRequest: names the field.
    """
    for name in ("length_penalty", "early_stopping"):
        if getattr(body, name) is not None and not body.use_beam_search:
            raise InvalidRequest(f"{name} goes with use_beam_search true; set it or leave {name} out", param=name)
