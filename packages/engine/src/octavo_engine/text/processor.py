"""Between text and token ids: makes valid requests out of prompts, and text out of the engine's updates.

It needs the tokenizer and the model's limits, not the model: a front end in another process has one of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from octavo_engine.beam_limits import BeamLimits
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Parent
from octavo_engine.errors import InvalidRequest, PromptTooLong
from octavo_engine.stop_automaton import StopAutomaton
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.text.answer_format import AnswerFormat
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.text.infill import InfillTokens, find_infill_tokens
from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.request_stream import RequestStream
from octavo_engine.text.sampling_tokens import SamplingTokens
from octavo_engine.text.stop_tokens import StopTokens
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.text.tool_prompt import makes_calls, tell_of_tools
from octavo_engine.text.tool_use import ToolUse
from octavo_engine.types import (
    Pooling,
    Request,
    SamplingParams,
    Task,
    TokenSpan,
)

_TAIL = 16  # tokens of a prompt that show whether it ends with a mark


class TextProcessor:
    """The text side of one model.

    Args:
        tokenizer: the model's tokenizer.
        chat_template: the model's chat template, or None if it has none.
        max_model_len: limit on prompt and output together, in tokens.
        max_num_seqs: the most samples one request may ask for.
        vocab_size: of the model; token ids must lie below it.
        default_sampling: values from the model's generation config that apply where a caller sets none.
        beam_limits: what the engine can search at once; None checks nothing of it.
        grammars: compiles the constraints of structured output; None refuses them.
        answers: how the model writes reasoning and calls; None is what its chat template shows.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        max_model_len: int,
        max_num_seqs: int,
        vocab_size: int,
        default_sampling: Mapping[str, Any] | None = None,
        beam_limits: BeamLimits | None = None,
        grammars: GrammarCompiler | None = None,
        answers: AnswerFormat | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.vocab_size = vocab_size
        self.default_sampling: Mapping[str, Any] = dict(default_sampling or {})
        self._chat_template = chat_template
        self._sampling_tokens = SamplingTokens(tokenizer, vocab_size)
        self._stop_tokens = StopTokens(tokenizer, vocab_size)
        self._beam_limits = beam_limits
        self._grammars = grammars
        self.answers = answers or AnswerFormat.of(chat_template.source if chat_template is not None else "")
        self._eos_token_ids = tuple(eos_token_ids)

    @cached_property
    def _infill(self) -> InfillTokens | None:
        return find_infill_tokens(self.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """True if `encode_chat` can be used."""
        return self._chat_template is not None

    def encode_prompt(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> list[int]:
        """Turn a prompt into token ids; token ids are checked and passed through.

        Raises:
            InvalidRequest: if the prompt is empty, of another type, or holds an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = list(prompt)
            self._check_ids(token_ids)
        if not token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        return token_ids

    def encode_infill(self, before: str | Sequence[int], after: str) -> list[int]:
        """Make the prompt for what stands between two texts; either may be empty.

        Raises:
            InvalidRequest: if the model was not trained for it, as far as its tokenizer shows.
        """
        if self._infill is None:
            raise InvalidRequest(
                "suffix is not supported by this model: its tokenizer has no tokens for filling in the middle; leave "
                "it out, or serve a model that has them",
                param="suffix",
                code="unsupported_parameter",
            )
        start = [i for i in self.tokenizer.encode("") if i in self.tokenizer.bos_token_ids]
        return self._infill.prompt(start, self.encode_continuation(before), self.encode_continuation(after))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Render a conversation with the model's chat template and turn it into token ids.

        Where the template knows no tools, the conversation tells the model of them. With `continue_final_message` the
        prompt ends inside the last message, so that the answer goes on from it.

        Raises:
            InvalidRequest: if the model has no template, there are no messages, or the template refuses them.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; send a completion instead", param="messages", code="no_chat_template"
            )
        if not messages:
            raise InvalidRequest("messages is empty; give at least one message", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other; set add_generation_prompt false",
                param="continue_final_message",
            )
        variables = dict(template_kwargs or {})
        if "add_generation_prompt" in variables:
            raise InvalidRequest(
                "add_generation_prompt is a field of its own; leave it out of the template's variables",
                param="add_generation_prompt",
            )
        if not self.answers.template_has_tools and (tools or makes_calls(messages)):
            messages, tools = tell_of_tools(messages, tools or ()), None
        text = self._chat_template.render(
            list(messages), tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
        if continue_final_message:
            text = _cut_after_final_message(text, messages[-1])
        # The template writes the special tokens itself.
        return self.encode_prompt(text, add_special_tokens=False)

    def answer_parser(self, use: ToolUse | None, prompt_token_ids: Sequence[int]) -> AnswerParser | None:
        """Return what reads one answer; None if it can hold nothing but content.

        Args:
            use: the functions that may be called.
            prompt_token_ids: what the answer follows.
        """
        answers = self.answers
        if not answers.parses(use):
            return None
        tail = self.tokenizer.decode(prompt_token_ids[-_TAIL:], skip_special_tokens=False).rstrip()
        begun = answers.reasoning is not None and tail.endswith(answers.reasoning.begin)
        return answers.parser(use, starts_in_reasoning=begun)

    def showing_marks(self, sampling: SamplingParams | BeamSearchParams) -> SamplingParams | BeamSearchParams:
        """Return sampling parameters that leave the marks in the text which `answer_parser` looks for."""
        token_ids = (self.tokenizer.token_id(mark) for mark in self.answers.marks)
        if not sampling.skip_special_tokens or self.tokenizer.special_token_ids.isdisjoint(token_ids):
            return sampling
        # Where special tokens are shown, those that end the text are left out as stop tokens alone.
        ends = () if sampling.ignore_eos else self._eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *ends)))
        return replace(sampling, skip_special_tokens=False, stop_token_ids=stop_token_ids)

    def encode_continuation(self, continuation: str | Sequence[int]) -> list[int]:
        """Turn what follows a branch into token ids; it may be empty, and gets no special tokens."""
        return self.encode_prompt(continuation, add_special_tokens=False) if continuation else []

    def make_request(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams | BeamSearchParams,
        *,
        request_id: str,
        task: Task = "generate",
        pooling: Pooling = "last",
        priority: int = 0,
        salt: bytes = b"",
        adapter: str | None = None,
        parent: Parent | None = None,
        keep: bool = False,
    ) -> Request:
        """Make a request that the engine can run: lengths checked, `max_tokens` and the seed filled in.

        Raises:
            PromptTooLong: if the prompt leaves no room for an output token, or `max_tokens` does not fit behind it.
            InvalidRequest: if `n`, or a search with beams, is more than the engine runs at once, a parameter does not
                fit the vocabulary, or structured output cannot be had as it is asked for (to compile it may take
                seconds, the first time).
        """
        beams = None
        if isinstance(sampling, BeamSearchParams):
            beams, sampling = sampling, sampling.sampling()
        prompt_token_ids = self._truncated(prompt_token_ids, sampling)
        num_prompt_tokens = len(prompt_token_ids)
        room = self.max_model_len - num_prompt_tokens
        wanted = sampling.max_tokens
        if task == "generate" and (room < 1 or (wanted is not None and wanted > room)):
            asked = f"{num_prompt_tokens} in the prompt" + ("" if wanted is None else f" and {wanted} to generate")
            raise PromptTooLong(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {asked};"
                " shorten the prompt or lower max_tokens."
            )
        if task == "embed" and room < 0:
            raise PromptTooLong(
                f"This model's maximum context length is {self.max_model_len} tokens. However, the input has"
                f" {num_prompt_tokens}; shorten it."
            )
        if sampling.num_sequences > self.max_num_seqs:
            name = "best_of" if sampling.ranks else "n"
            raise InvalidRequest(
                f"{name} is {sampling.num_sequences}, at most {self.max_num_seqs} samples run at once; lower {name}",
                param=name,
            )
        if keep and (beams is not None or sampling.ranks):
            name = "best_of" if beams is None else "beam_width"
            raise InvalidRequest(
                f"keep does not go with {name}: the sequences that are returned are not those that ran", param="keep"
            )
        sampling = self._sampling_tokens.resolve(sampling)
        max_tokens = wanted or max(room, 1)
        if beams is not None:
            self._check_beams(beams, num_prompt_tokens, max_tokens)
        grammar_seconds = 0.0
        if sampling.structured_outputs is not None:
            begun = time.monotonic()
            self._check_constraint(sampling.structured_outputs)
            grammar_seconds = time.monotonic() - begun
        return Request(
            request_id=request_id,
            inputs=(TokenSpan(tuple(prompt_token_ids)),),
            sampling=replace(sampling, max_tokens=max_tokens),
            beams=beams,
            stops=None if beams is None else self._stops(sampling),
            task=task,
            pooling=pooling,
            priority=priority,
            salt=salt,
            adapter=adapter,
            parent=parent,
            keep=keep,
            grammar_seconds=grammar_seconds,
        )

    def _check_constraint(self, params: StructuredOutputsParams) -> None:
        if self._grammars is None:
            raise InvalidRequest("structured output is not served here", param="structured_outputs")
        self._grammars.check(params)

    def _stops(self, sampling: SamplingParams) -> StopAutomaton | None:
        if not sampling.stop_strings:
            return None
        return self._stop_tokens.automaton(sampling.stop_strings, skip_special_tokens=sampling.skip_special_tokens)

    def stream(self, request: Request) -> RequestStream:
        """Start to turn the engine's updates for a request into text."""
        return RequestStream(request, self.tokenizer)

    def _check_beams(self, beams: BeamSearchParams, num_prompt_tokens: int, max_tokens: int) -> None:
        if beams.beam_width > self.vocab_size:
            raise InvalidRequest(
                f"beam_width is {beams.beam_width}, the vocabulary has {self.vocab_size} tokens; lower beam_width",
                param="beam_width",
            )
        if self._beam_limits is not None:
            self._beam_limits.check(beams, num_prompt_tokens, max_tokens)

    def _truncated(self, token_ids: Sequence[int], sampling: SamplingParams) -> Sequence[int]:
        """Return the last tokens of a prompt, as many as the request wants at most."""
        most = sampling.truncate_prompt_tokens
        if most is None:
            return token_ids
        if most > self.max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {most}, more than the context of {self.max_model_len} tokens; lower it",
                param="truncate_prompt_tokens",
            )
        if most == -1:
            most = max(self.max_model_len - (sampling.max_tokens or 1), 1)
        return token_ids[-most:]

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequest(f"a prompt of token ids must hold integers, got {token_id!r}", param="prompt")
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is out of vocabulary; ids go from 0 to {self.vocab_size - 1}", param="prompt"
                )


def _cut_after_final_message(text: str, message: Mapping[str, Any]) -> str:
    """Drop what the template writes after the last message's content."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise InvalidRequest("continue_final_message needs a last message with text", param="continue_final_message")
    at = text.rfind(content.rstrip())
    if at < 0:
        raise InvalidRequest(
            "the chat template does not reproduce the last message, so it cannot be continued",
            param="continue_final_message",
        )
    return text[: at + len(content.rstrip())]
