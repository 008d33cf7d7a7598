"""StopTokens: makes a StopAutomaton of stop strings, from the bytes of a vocabulary's tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile

from octavo_engine.stop_automaton import StopAutomaton
from octavo_engine.text.tokenizer import Tokenizer

_MAX_REMEMBERED = 16  # automata that are kept


class StopTokens:
    """The stop strings of requests as automata over one vocabulary.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._known: OrderedDict[tuple[tuple[str, ...], bool], StopAutomaton] = OrderedDict()

    def automaton(self, stops: Sequence[str], *, skip_special_tokens: bool) -> StopAutomaton:
        """Return the automaton of some stop strings, none of them empty."""
        key = (tuple(sorted(set(stops))), skip_special_tokens)
        if key not in self._known:
            self._known[key] = self._make(*key)
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def _make(self, stops: Sequence[str], skip_special_tokens: bool) -> StopAutomaton:
        skipped = self._tokenizer.special_token_ids if skip_special_tokens else frozenset()
        silent = skipped.union(self._ids_of.get(b"", ()))
        matcher = _Matcher([stop.encode("utf-8", "surrogatepass") for stop in stops])
        first = {raw: matcher.after(b"", raw) for raw in self._ids_of}
        next_states = {
            i: state for raw, token_ids in self._ids_of.items() if (state := first[raw]) != 0 for i in token_ids
        }
        compatible = {rest: self._compatible(rest) for rest in matcher.rests}
        exceptions: dict[tuple[int, int], int | None] = {}
        for number, held in enumerate(matcher.states):
            for raw in {raw for rest in matcher.rests_from(held) for raw in compatible[rest]}:
                if (state := matcher.after(held, raw)) != first[raw]:
                    exceptions |= {(number, token_id): state for token_id in self._ids_of[raw]}
        return StopAutomaton(next_states, exceptions, silent)

    def _compatible(self, rest: bytes) -> list[bytes]:
        """Return the tokens that are the beginning of a text, and those that it is the beginning of."""
        beginnings = [rest[:length] for length in range(1, len(rest)) if rest[:length] in self._ids_of]
        in_order = self._in_order
        places = range(bisect_left(in_order, rest), len(in_order))
        return beginnings + list(takewhile(lambda raw: raw.startswith(rest), map(in_order.__getitem__, places)))

    @cached_property
    def _ids_of(self) -> dict[bytes, list[int]]:
        """The tokens by their bytes."""
        ids: dict[bytes, list[int]] = {}
        for token_id in range(self._vocab_size):
            ids.setdefault(self._tokenizer.token_bytes(token_id), []).append(token_id)
        return ids

    @cached_property
    def _in_order(self) -> list[bytes]:
        return sorted(self._ids_of)


class _Matcher:
    """Stop strings as bytes. A state is the longest end of a text that one of them begins with.

    Attributes:
        states: by number; the first is that of a text which ends with nothing of a stop string.
        rests: every end of a stop string.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = stops
        self._any = re.compile(b"|".join(map(re.escape, stops)))
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        self.states = [b"", *sorted(held for held in beginnings if not self._any.search(held))]
        self.rests = {stop[length:] for stop in stops for length in range(1, len(stop))}
        self._numbers = {held: number for number, held in enumerate(self.states)}
        self._last_bytes = {held[-1] for held in beginnings}
        self._longest = max(map(len, self.states))

    def after(self, held: bytes, raw: bytes) -> int | None:
        """Return the number of the state after a token that follows a state; None if a stop string is complete."""
        text = held + raw
        if self._any.search(text):
            return None
        if not text or text[-1] not in self._last_bytes:
            return 0
        ends = (text[len(text) - length :] for length in range(min(self._longest, len(text)), 0, -1))
        return next((self._numbers[end] for end in ends if end in self._numbers), 0)

    def rests_from(self, held: bytes) -> Iterator[bytes]:
        """Return what would complete stop strings from a state."""
        for start in range(len(held)):
            yield from (stop[len(held) - start :] for stop in self._stops if stop.startswith(held[start:]))
