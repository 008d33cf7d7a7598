"""TextStream: the text of one generated sequence, detokenised and cut at stop strings as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo_engine.text.detokenizer import Detokenizer
from octavo_engine.text.stop import StopMatcher
from octavo_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one push adds.

    `num_tokens_used` counts the pushed tokens up to and with the one that completed the stop string `stop_reason`;
    without a stop (`stop_reason` None) it counts all of them.
    """

    text: str
    num_tokens_used: int
    stop_reason: str | None


class TextStream:
    """One sequence's text as it grows; made per sequence, used by one thread at a time.

    Args:
        tokenizer: The model's tokenizer.
        stop: Stop strings, none empty.
        include_stop_str_in_output: Whether the text ends with the stop string or before it.
        skip_special_tokens: Whether special tokens add no text.
        min_tokens: Tokens at the beginning in whose text no stop string is looked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, continues_prompt=True)
        self._matcher = StopMatcher(stop, include_stop_str_in_output)
        self._num_unwatched = min_tokens
        self._ended = False

    def push(self, token_ids: Sequence[int], *, finished: bool) -> TextDelta:
        """Take in the next tokens and return the text that can be shown.

        With `finished` the held-back rest comes too: the beginning of a stop string that never came, or U+FFFD for a
        character that never became whole. After a stop or `finished` the stream must not be pushed again.
        """
        assert not self._ended, "push after the end of the stream"
        if not self._matcher.watches:
            self._ended = finished
            text = self._detokenizer.push_all(token_ids)
            return TextDelta(text + self._detokenizer.finish() if finished else text, len(token_ids), None)
        shown: list[str] = []
        for index, token_id in enumerate(token_ids):
            text = self._detokenizer.push(token_id)
            if self._num_unwatched > 0:
                self._num_unwatched -= 1
                shown.append(text)
                continue
            text, stopped = self._matcher.feed(text)
            shown.append(text)
            if stopped is not None:
                self._ended = True
                return TextDelta("".join(shown), index + 1, stopped)
        stopped = None
        if finished:
            self._ended = True
            text, stopped = self._matcher.feed(self._detokenizer.finish())
            shown += [text] if stopped is not None else [text, self._matcher.flush()]
        return TextDelta("".join(shown), len(token_ids), stopped)
