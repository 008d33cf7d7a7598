"""Text-generation-inference's shapes: tokens, details, events and errors."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.types import CompletionDelta, FinishReason, Request, TokenLogprobs
from octavo_server.logprobs import finite
from octavo_server.protocol.generate import GenerateBody
from octavo_server.streaming import to_json


class GeneratedText:
    """One text as it grows, with an entry for each of its tokens, the end token included.

    Joined, the texts of ordinary tokens are the text: one that only begins a character has none, and the one that
    completes it has the character.
    """

    def __init__(self, body: GenerateBody, request: Request, tokenizer: Tokenizer) -> None:
        self._options = body.options
        self._text = [body.inputs] if self._options.return_full_text else []
        self._request = request
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: CompletionDelta | None = None
        self.tokens: list[dict[str, Any]] = []
        self.top_tokens: list[list[dict[str, Any]]] = []
        self.logprob_sum = 0.0

    @property
    def text(self) -> str:
        """The text so far, behind the prompt if that was asked for."""
        return "".join(self._text)

    def push(self, delta: CompletionDelta) -> None:
        """Take in what is new."""
        self._last = delta
        self._text.append(delta.text)
        for logprobs in delta.logprobs or ():
            self.logprob_sum += logprobs.logprob
            self.tokens.append(self._token(logprobs))
            if self._options.top_n_tokens:
                self.top_tokens.append([self._alternative(*other) for other in logprobs.top])

    def ending(self) -> dict[str, Any]:
        """Return why it ended, how long it is, and the seed if it was drawn."""
        assert self._last is not None
        seed = self._request.seed if self._options.seed is None else self._options.seed
        return {
            "finish_reason": _finish_reason(self._last),
            "generated_tokens": self._last.num_tokens,
            "seed": seed if self._options.samples else None,
        }

    def details(self, prefill: list[dict[str, Any]]) -> dict[str, Any]:
        """Return all that is known of it."""
        tops = {"top_tokens": self.top_tokens} if self.top_tokens else {}
        return self.ending() | {"prefill": prefill, "tokens": self.tokens} | tops

    def _token(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        token_id = logprobs.token_id
        raw = self.tokenizer.token_bytes(token_id)
        special = token_id in self.tokenizer.special_token_ids
        text = raw.decode("utf-8", "replace") if special else self._decoder.decode(raw)
        return {"id": token_id, "text": text, "logprob": finite(logprobs.logprob), "special": special}

    def _alternative(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        special = token_id in self.tokenizer.special_token_ids
        return {"id": token_id, "text": text, "logprob": finite(logprob), "special": special}


def prefill_of(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return the tokens of a prompt; the first has no log-probability."""
    values = [None, *(finite(entry.logprob) for entry in logprobs)]
    return [
        {"id": token_id, "text": tokenizer.token_bytes(token_id).decode("utf-8", "replace"), "logprob": value}
        for token_id, value in zip(token_ids, values, strict=True)
    ]


def event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event in the way that TGI writes it."""
    return b"data:" + to_json(value) + b"\n\n"


def _finish_reason(delta: CompletionDelta) -> str:
    if delta.finish_reason is FinishReason.LENGTH:
        return "length"
    return "eos_token" if delta.stop_reason is None else "stop_sequence"
