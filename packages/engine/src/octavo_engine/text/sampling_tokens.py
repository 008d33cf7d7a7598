"""What sampling parameters say in words, as token ids: bad words and sequence breakers; and whether ids exist."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import replace

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.text.tokenizer import Tokenizer

_MAX_REMEMBERED = 256  # sequence breakers whose tokens are kept


class SamplingTokens:
    """Makes sampling parameters ready for a model's vocabulary.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: of the model; token ids must lie below it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._breaker_ids: dict[str, tuple[int, ...]] = {}

    def resolve(self, sampling: SamplingParams) -> SamplingParams:
        """Return the parameters with strings as token ids.

        Raises:
            InvalidRequest: if an id is outside the vocabulary, or a string has no tokens; names the parameter.
        """
        self._check("stop_token_ids", sampling.stop_token_ids)
        self._check("logit_bias", sampling.logit_bias)
        self._check("logprob_token_ids", sampling.logprob_token_ids)
        self._check("allowed_token_ids", sampling.allowed_token_ids or ())
        self._check("bad_words_ids", (token_id for ids in sampling.bad_words_ids for token_id in ids))
        if sampling.bad_words:
            sequences = [ids for word in sampling.bad_words for ids in self._tokenisations(word)]
            sampling = replace(sampling, bad_words_ids=tuple(dict.fromkeys((*sampling.bad_words_ids, *sequences))))
        if sampling.dry_multiplier:
            self._check("dry_breaker_ids", sampling.dry_breaker_ids)
            breakers = {i for text in sampling.dry_sequence_breakers for i in self._breakers(text)}
            sampling = replace(sampling, dry_breaker_ids=tuple(sorted(breakers.union(sampling.dry_breaker_ids))))
        return sampling

    def _check(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self._vocab_size:
                raise InvalidRequest(
                    f"{name} holds {token_id}, which is out of vocabulary (size {self._vocab_size})", param=name
                )

    def _tokenisations(self, word: str) -> list[tuple[int, ...]]:
        """Return a word's tokens as written, and as the first and a later word of a sentence."""
        bare = word.strip(" ")
        texts = (word, bare, f" {bare}") if bare else (word,)
        ways = list(dict.fromkeys(tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts))
        if not all(ways):
            raise InvalidRequest(f"bad_words holds {word!r}, which has no tokens; leave it out", param="bad_words")
        return ways

    def _breakers(self, text: str) -> tuple[int, ...]:
        """Return the tokens whose text holds a sequence breaker; the whole vocabulary is read once per breaker."""
        known = self._breaker_ids.get(text)
        if known is None:
            raw = codecs.encode(text, "utf-8", "replace")
            token_bytes = self._tokenizer.token_bytes
            known = tuple(i for i in range(min(self._vocab_size, self._tokenizer.vocab_size)) if raw in token_bytes(i))
            if not known:
                raise InvalidRequest(
                    f"dry_sequence_breakers holds {text!r}, which no single token of this model contains; shorten it",
                    param="dry_sequence_breakers",
                )
            if len(self._breaker_ids) < _MAX_REMEMBERED:
                self._breaker_ids[text] = known
        return known
