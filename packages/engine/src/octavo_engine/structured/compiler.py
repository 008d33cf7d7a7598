"""GrammarCompiler: constraints to matchers, within a time budget, kept in a cache; safe to use from several threads."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.grammars import grammar_of, json_grammar
from octavo_engine.structured.json_schema import refuse
from octavo_engine.structured.locate import find_keyword
from octavo_engine.structured.params import KINDS, StructuredOutputsParams
from octavo_engine.structured.timed_calls import TimedCalls
from octavo_engine.structured.vocabulary import make_vocabulary
from octavo_engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NUM_CACHED = 256
TIME_BUDGET = 5.0
"""Seconds that one constraint may take to compile; llguidance's own limits bound its memory and each later mask."""

_MAX_NUM_COMPILING = 8  # at once, those that have run out of time included
_MAX_REASON = 500  # characters; llguidance repeats what it was given


class GrammarCompiler:
    """Makes matchers, each of which follows one sequence and says which tokens may come next.

    llguidance is imported, and the vocabulary read, with the first constraint.

    Args:
        tokenizer: the model's.
        vocab_size: of the model.
        eos_token_ids: tokens that end a text; a matcher allows them only where its grammar may end.
        num_cached: constraints that are kept compiled, the least recently used one goes first.
        time_budget: seconds.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        num_cached: int = NUM_CACHED,
        time_budget: float = TIME_BUDGET,
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._num_cached = num_cached
        self._calls = TimedCalls(time_budget, _MAX_NUM_COMPILING)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._cache: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()

    def check(self, params: StructuredOutputsParams) -> None:
        """Compile a constraint and compute its first mask, so that `matcher` finds it ready.

        Raises:
            InvalidRequest: if it is malformed, not supported, too large or too slow, or nothing fits it; a JSON Schema
                is refused with a pointer to the keyword.
            EngineBusy: if others have been compiling for too long.
        """
        self._compiled(params)

    def matcher(self, params: StructuredOutputsParams) -> LLMatcher:
        """Return a matcher at the start of a constraint's text.

        Raises:
            InvalidRequest, EngineBusy: see `check`.
        """
        return self._compiled(params).deep_copy()

    def _compiled(self, params: StructuredOutputsParams) -> LLMatcher:
        """Return the matcher that others are copied from; nobody moves it on."""
        with self._lock:
            if params in self._cache:
                self._cache.move_to_end(params)
                return self._cache[params]
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(
                    self._tokenizer, vocab_size=self.vocab_size, eos_token_ids=self._eos_token_ids
                )
        compiled = self._compile_in_time(params, self._vocabulary)
        with self._lock:
            self._cache[params] = compiled
            while len(self._cache) > self._num_cached:
                self._cache.popitem(last=False)
        return compiled

    def _compile_in_time(self, params: StructuredOutputsParams, vocabulary: LLTokenizer) -> LLMatcher:
        try:
            return self._calls.run(lambda: self._compile(params, vocabulary))
        except TimeoutError as error:
            raise InvalidRequest(
                f"structured_outputs takes more than {self._calls.time_budget:g} s to compile; make it simpler",
                param="structured_outputs",
                code="grammar_too_complex",
            ) from error

    def _compile(self, params: StructuredOutputsParams, vocabulary: LLTokenizer) -> LLMatcher:
        try:
            matcher = start(grammar_of(params, self._tokenizer), vocabulary)
            first = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        except RecursionError as error:
            raise InvalidRequest("structured_outputs is nested too deeply", param="structured_outputs") from error
        if matcher.is_error():
            _refuse(params, vocabulary, error_of(matcher))
        allowed = np.flatnonzero(np.unpackbits(first, bitorder="little"))
        if set(allowed.tolist()) <= set(self._eos_token_ids):
            _refuse(params, vocabulary, "nothing but the empty text fits it")
        return matcher


def start(grammar: str, vocabulary: LLTokenizer) -> LLMatcher:
    """Return a matcher of a grammar; it may be in error already."""
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


def error_of(matcher: LLMatcher) -> str:
    """Return why a matcher is in error, without llguidance's internals."""
    reason = re.split(r"\n<|\n +while processing", matcher.get_error())[0].strip()
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."


def _refuse(params: StructuredOutputsParams, vocabulary: LLTokenizer, reason: str) -> NoReturn:
    """Raise InvalidRequest; of a JSON Schema, for the keyword that it is about."""
    if params.json is not None:
        assert isinstance(params.json, str)
        found = find_keyword(json.loads(params.json), lambda schema: _error_in(schema, params, vocabulary))
        refuse(*(found or ("", reason)))
    kind = next(kind for kind in KINDS if getattr(params, kind))
    raise InvalidRequest(f"structured_outputs.{kind}: {reason}", param="structured_outputs", code="invalid_grammar")


def _error_in(schema: Any, params: StructuredOutputsParams, vocabulary: LLTokenizer) -> str | None:
    matcher = start(json_grammar(schema, params.whitespace_pattern), vocabulary)
    matcher.compute_bitmask()
    return error_of(matcher) if matcher.is_error() else None
