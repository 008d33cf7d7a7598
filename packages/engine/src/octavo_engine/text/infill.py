"""Infill: how models that were trained for it are asked for what stands between two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo_engine.text.tokenizer import Tokenizer

NAMES = ("fim_prefix_token", "fim_suffix_token", "fim_middle_token")
"""What a tokenizer calls the tokens where its file says which they are."""

_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, StableCode
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek Coder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # CodeGeeX
)


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """The tokens before the prefix, before the suffix, and behind both, where the answer begins (arXiv 2207.14255)."""

    prefix: int
    suffix: int
    middle: int

    def prompt(self, start: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Return the prompt for what stands between two texts; `start` are the tokens that any prompt begins with."""
        return [*start, self.prefix, *before, self.suffix, *after, self.middle]


def find_infill_tokens(tokenizer: Tokenizer) -> InfillTokens | None:
    """Return the tokens that a tokenizer's file names, else those of known spellings; None if there are none."""
    named = tuple(tokenizer.special_tokens.get(name, "") for name in NAMES)
    for spellings in (named, *_SPELLINGS):
        found = [_find(tokenizer, spelling) for spelling in spellings]
        known = [token_id for token_id in found if token_id is not None]
        if len(set(known)) == len(spellings):
            return InfillTokens(*known)
    return None


def _find(tokenizer: Tokenizer, spelling: str) -> int | None:
    token_id = tokenizer.token_id(spelling) if spelling else None
    return token_id if token_id is not None and tokenizer.token(token_id) == spelling else None
