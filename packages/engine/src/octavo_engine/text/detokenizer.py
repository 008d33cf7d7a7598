"""Detokenizer: token ids to text as they come, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from octavo_engine.text.tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one growing sequence; the pieces join to `tokenizer.decode(all_ids)`.

    A character whose bytes lie in several tokens comes out with the last of them. At most three bytes are held back, so
    each token costs time in its own length only.

    Args:
        tokenizer: Gives the tokens' bytes.
        skip_special_tokens: Whether special tokens add no text.
        continues_prompt: Whether the ids go on from a prompt. A SentencePiece tokenizer then keeps the space before
            the first word, which it would drop at the start of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues_prompt: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = _new_decoder("replace")
        self._strip_next = tokenizer.strip_leading_space and not continues_prompt

    def push(self, token_id: int) -> str:
        """Take in one token and return the text that is complete now; it may be empty."""
        if token_id in self._skipped:
            return ""
        return self._stripped(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Take in several tokens; the same text as that of pushing one after the other, in one go."""
        skipped, token_bytes = self._skipped, self._tokenizer.token_bytes
        return self._stripped(self._decoder.decode(b"".join([token_bytes(i) for i in token_ids if i not in skipped])))

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD once if the last character never became whole, else nothing."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not self._strip_next or not text:
            return text
        self._strip_next = False
        return text.removeprefix(" ")
