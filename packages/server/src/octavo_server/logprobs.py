"""Tokens with their log-probabilities as the wire shows them, paced so that they never run ahead of the text."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.types import CompletionDelta, FinishReason, TokenLogprobs

_LOWEST = -9999.0  # the wire's word for minus infinity, which JSON cannot hold


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token of a choice: the text it completes, where that starts in the choice, and its log-probabilities."""

    text: str
    raw: bytes
    start: int
    logprobs: TokenLogprobs

    @property
    def end(self) -> int:
        """Where its text ends, in characters."""
        return self.start + len(self.text)


class LogprobTrack:
    """The entries of one choice. Joined, their texts are the choice's text, and their bytes encode it.

    A token that only begins a character has no text; the token that completes it has the whole character. Special
    tokens that the text leaves out, and tokens behind a stop string, have no entry.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: deque[TokenEntry] = deque()
        self._num_decoded = 0
        self._num_emitted = 0

    def push(self, delta: CompletionDelta) -> None:
        """Take in what is new."""
        for logprobs in delta.logprobs or ():
            if logprobs.token_id in self._skipped:
                continue
            raw = self._tokenizer.token_bytes(logprobs.token_id)
            self._append(self._decoder.decode(raw), raw, logprobs)
        self._num_emitted += len(delta.text)
        if delta.finish_reason is not None:
            self._end(cut=delta.finish_reason is FinishReason.STOP)

    def take(self) -> list[TokenEntry]:
        """Return, once, the entries whose text has been emitted."""
        taken = []
        while self._waiting and self._waiting[0].end <= self._num_emitted:
            taken.append(self._waiting.popleft())
        return taken

    def _append(self, text: str, raw: bytes, logprobs: TokenLogprobs) -> None:
        self._waiting.append(TokenEntry(text, raw, self._num_decoded, logprobs))
        self._num_decoded += len(text)

    def _end(self, *, cut: bool) -> None:
        tail = self._decoder.decode(b"", final=True)
        if tail and self._waiting:
            last = self._waiting.pop()
            self._waiting.append(replace(last, text=last.text + tail))
        if cut:
            visible = [entry for entry in self._waiting if entry.start < self._num_emitted]
            self._waiting = deque(_cut(entry, self._num_emitted) for entry in visible)
        else:
            self._num_emitted = max(self._num_emitted, self._num_decoded + len(tail))


def _cut(entry: TokenEntry, end: int) -> TokenEntry:
    if entry.end <= end:
        return entry
    text = entry.text[: end - entry.start]
    return replace(entry, text=text, raw=text.encode())


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return a token's text; bytes that are no text by themselves as OpenAI writes them, such as `bytes:\xf0`."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How an answer names tokens: by their text, or as `token_id:5` where a client wants to tell them all apart."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def of_id(self, token_id: int) -> str:
        """Name a token by itself."""
        return f"token_id:{token_id}" if self.as_ids else token_label(self.tokenizer, token_id)

    def of_text(self, token_id: int, text: str) -> str:
        """Name a token that brings a text."""
        return f"token_id:{token_id}" if self.as_ids else text


def named_top(logprobs: TokenLogprobs, names: TokenNames, num_top: int | None = None) -> dict[str, float]:
    """Return the likeliest tokens of a position, all or `num_top`, by their texts, and the position's own token."""
    top = {names.of_id(token_id): finite(logprob) for token_id, logprob in logprobs.top[:num_top]}
    top.setdefault(names.of_id(logprobs.token_id), finite(logprobs.logprob))
    return top


def completion_logprobs(entries: Iterable[TokenEntry], names: TokenNames, start: int = 0) -> dict[str, Any]:
    """Return entries in the form of text completions, four lists of equal length; their text begins at `start`."""
    tokens, token_logprobs, top_logprobs, text_offset = [], [], [], []
    for entry in entries:
        tokens.append(names.of_text(entry.logprobs.token_id, entry.text))
        token_logprobs.append(finite(entry.logprobs.logprob))
        text_offset.append(start + entry.start)
        top_logprobs.append(named_top(entry.logprobs, names))
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }


def chat_logprobs(entries: Iterable[TokenEntry], names: TokenNames) -> dict[str, Any]:
    """Return entries in the form of chat completions."""
    return {
        "content": [
            _chat_token(names.of_text(entry.logprobs.token_id, entry.text), entry.raw, entry.logprobs.logprob)
            | {
                "top_logprobs": [
                    _chat_token(names.of_id(token_id), names.tokenizer.token_bytes(token_id), logprob)
                    for token_id, logprob in entry.logprobs.top
                ]
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_token(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """Return a log-probability as JSON can hold it."""
    return min(logprob, 0.0) if logprob >= _LOWEST else _LOWEST
