"""The model's vocabulary for llguidance: the bytes of every token, which are special, and how text is tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from octavo_engine.errors import InvalidRequest
from octavo_engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_NUM_KEPT, _KEPT_CHARS = 4096, 256  # forced texts, such as keys and commas, are few and come again and again
_LEAD = "\n"  # text that begins with it is not given a space by tokenizers of SentencePiece's kind


def make_vocabulary(tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Build what llguidance needs to know of a tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: of the model; its ids beyond the tokenizer's are never allowed.
        eos_token_ids: tokens that end a text.

    Raises:
        InvalidRequest: if the model has no token that ends a text, or llguidance is not installed.
    """
    if not eos_token_ids:
        raise InvalidRequest(
            "structured output needs a token that ends a text, and this model names none", param="structured_outputs"
        )
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise InvalidRequest(
            "structured output needs the package llguidance; install it with `pip install 'octavo-engine[structured]'`",
            param="structured_outputs",
            code="structured_outputs_not_installed",
        ) from error
    adapter = _Adapter(tokenizer, vocab_size, eos_token_ids[0])
    vocabulary = LLTokenizer(TokenizerWrapper(adapter), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    adapter.vocabulary = vocabulary
    return vocabulary


class _Adapter:
    """The attributes that llguidance reads of a tokenizer, and a call that tokenises text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        special = tokenizer.special_token_ids
        self.eos_token_id = eos_token_id
        self.bos_token_id = next(iter(tokenizer.bos_token_ids), None)
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.vocabulary: LLTokenizer | None = None
        self._tokenizer = tokenizer
        self._kept = lru_cache(_NUM_KEPT)(self._tokenise)

    def __call__(self, text: str) -> list[int]:
        """Return ordinary tokens with exactly the bytes of a text: the model's own where there are such."""
        return self._kept(text) if len(text) <= _KEPT_CHARS else self._tokenise(text)

    def _tokenise(self, text: str) -> list[int]:
        data = text.encode()
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if self._spells(token_ids, data):
            return token_ids
        lead = self._tokenizer.encode(_LEAD, add_special_tokens=False)
        token_ids = self._tokenizer.encode(_LEAD + text, add_special_tokens=False)
        if token_ids[: len(lead)] == lead and self._spells(token_ids[len(lead) :], data):
            return token_ids[len(lead) :]
        assert self.vocabulary is not None, "llguidance tokenises nothing while it reads the vocabulary"
        return self.vocabulary.greedy_tokenize(text)

    def _spells(self, token_ids: list[int], data: bytes) -> bool:
        if not self._tokenizer.special_token_ids.isdisjoint(token_ids):
            return False
        return b"".join(self._tokenizer.token_bytes(token_id) for token_id in token_ids) == data
