"""Log-probabilities of prompts on the wire: of an echoed prompt, and in the form of vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.types import TokenLogprobs
from octavo_server.logprobs import TokenNames, finite, named_top, token_label


def echo_logprobs(
    echo: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], names: TokenNames, num_top: int
) -> dict[str, Any]:
    """Return the four lists of a text completion for a prompt that stands before its text.

    There is an entry for each token of the prompt, so that clients can count them. The first has no log-probability. A
    token that adds no whole character, and a special one that the text leaves out, has the text "".

    Args:
        echo: the prompt's text, as it is echoed.
        token_ids: the prompt.
        logprobs: of its tokens from the second on.
        names: of tokens.
        num_top: alternatives to show.
    """
    tokenizer = names.tokenizer
    tokens: list[str] = []
    text_offset: list[int] = []
    offset, pending = 0, b""
    for token_id in token_ids:
        raw = tokenizer.token_bytes(token_id)
        text_offset.append(offset)
        if token_id in tokenizer.special_token_ids and not echo.startswith(raw.decode("utf-8", "replace"), offset):
            tokens.append(names.of_text(token_id, ""))
            continue
        pending += raw
        text = _whole_text(pending)
        if offset == 0 and text.startswith(" ") and not echo.startswith(" "):  # the tokenizer put it there
            text = text[1:]
        pending = b"" if text or not pending else pending
        tokens.append(names.of_text(token_id, text))
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None, *(finite(entry.logprob) for entry in logprobs)],
        "top_logprobs": [None, *(named_top(entry, names, num_top) for entry in logprobs)],
        "text_offset": text_offset,
    }


def listed(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer, num_top: int) -> list[dict[str, Any] | None]:
    """Return vLLM's form: for each token of the prompt but the first, log-probabilities and ranks by token id."""
    return [None, *(_by_token_id(entry, tokenizer, num_top) for entry in logprobs)]


def _by_token_id(entry: TokenLogprobs, tokenizer: Tokenizer, num_top: int) -> dict[str, Any]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [
        (token_id, logprob, rank)
        for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1)
        if token_id != entry.token_id
    ]
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": token_label(tokenizer, token_id)}
        for token_id, logprob, rank in ranked
    }


def _whole_text(raw: bytes) -> str:
    """Return the text of some bytes; "" if they end within a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        incomplete = error.end == len(raw) and len(raw) - error.start < 4
        return "" if incomplete else raw.decode("utf-8", "replace")
