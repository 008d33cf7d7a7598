"""RequestStream: the engine's updates for one request, as the text of its choices."""

from __future__ import annotations

from octavo_engine.errors import request_error
from octavo_engine.text.output import TextStream
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.types import CompletionDelta, FinishReason, Request, SequenceUpdate


class RequestStream:
    """The text of one request's choices as it grows; ends each choice exactly once."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        sampling = request.sampling
        self._request = request
        self._streams = [
            TextStream(
                tokenizer,
                stop=sampling.stop_strings,
                include_stop_str_in_output=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
            )
            for _ in range(sampling.num_sequences)
        ]
        self._num_tokens = [0] * sampling.num_sequences
        self._open = set(range(sampling.num_sequences))

    @property
    def finished(self) -> bool:
        """True once every choice has ended."""
        return not self._open

    def push(self, update: SequenceUpdate) -> CompletionDelta | None:
        """Take in one update; None if the choice has ended already.

        A delta with finish reason `stop` and a stop string as reason means that the engine does not know yet: the
        caller aborts that sequence.

        Raises:
            RequestFailed: if the update reports an error.
        """
        if update.num_choices is not None:
            self._open.intersection_update(range(update.num_choices))
        if update.index not in self._open:
            return None
        if update.finish_reason is FinishReason.ERROR:
            raise request_error(update.error, "the engine could not compute this request")
        text_ids, hidden = self._visible(update)
        finished = update.finish_reason is not None
        delta = self._streams[update.index].push(text_ids, finished=finished)
        cut = delta.stop_reason is not None
        token_ids = update.token_ids[: delta.num_tokens_used] if cut else update.token_ids
        self._num_tokens[update.index] += len(token_ids)
        reason = FinishReason.STOP if cut else update.finish_reason
        if reason is not None:
            self._open.discard(update.index)
        return CompletionDelta(
            index=update.index,
            text=delta.text,
            token_ids=token_ids,
            num_tokens=self._num_tokens[update.index],
            logprobs=update.logprobs[: len(token_ids)] if update.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=delta.stop_reason if cut else hidden,
            cached=update.cached,
            times=update.times,
            prompt_logprobs=update.prompt_logprobs,
            score=update.score,
        )

    def _visible(self, update: SequenceUpdate) -> tuple[tuple[int, ...], int | None]:
        """Return the tokens that make text, and the caller's own stop token if it ended the choice (it is left out)."""
        sampling = self._request.sampling
        stop_id = update.stop_token_id
        if stop_id is None or stop_id not in sampling.stop_token_ids:
            return update.token_ids, None
        if sampling.include_stop_str_in_output:
            return update.token_ids, stop_id
        return update.token_ids[:-1], stop_id
