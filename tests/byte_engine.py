"""An engine without a model for the server's tests across packages: bytes are its tokens, and its memory is exact.

The scheduler, the cache and the asyncio front end are the real ones; a fake executor stands in for the model. It says
the letters of the alphabet in turn, finds every token equally likely, and a gate lets so many steps through, so that a
test decides what happens between.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from octavo_engine.api import EngineInfo
from octavo_engine.async_engine import AsyncEngine
from octavo_engine.batch import ModelOutput, NewRow, ScheduledBatch
from octavo_engine.engine import Engine
from octavo_engine.executor.base import Pending
from octavo_engine.executor.fake import FakeExecutor
from octavo_engine.scheduler import Scheduler
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer, TokenizerRules
from octavo_engine.types import TokenLogprobs
from octavo_kvcache import CacheManager

EOS = 256
VOCAB_SIZE = 257
BLOCK_SIZE = 4
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_RULES = TokenizerRules(
    bytes_of=lambda token: token.encode("latin-1"),
    strip_leading_space=False,
    special_token_ids=frozenset({EOS}),
    special_tokens={"eos_token": "<eos>"},
)


class _Bytes:
    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token(self, token_id: int) -> str | None:
        return "<eos>" if token_id == EOS else chr(token_id)

    def token_id(self, token: str) -> int | None:
        return EOS if token == "<eos>" else ord(token[0])


@dataclass
class Gate:
    """Lets steps through: all, or so many."""

    steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(10**9))

    def allow_only(self, num_steps: int) -> None:
        self.steps = threading.Semaphore(num_steps)

    def open(self) -> None:
        held, self.steps = self.steps, threading.Semaphore(10**9)
        held.release(1000)


class _GatedExecutor(FakeExecutor):
    gate: Gate
    asked: dict[int, NewRow]  # by row

    def submit(self, batch: ScheduledBatch) -> Pending:
        assert self.gate.steps.acquire(timeout=20), "the gate was never opened"
        return super().submit(batch)

    def _run(self, batch: ScheduledBatch) -> ModelOutput:
        output = super()._run(batch)
        self.asked.update((new.row, new) for new in batch.new)
        drawn: list[tuple[TokenLogprobs, ...] | None] = [None] * batch.num_rows
        of_prompts = {}
        for place, (row, token_ids) in enumerate(zip(batch.rows, output.token_ids, strict=True)):
            if not token_ids:
                continue
            new = self.asked[row]
            sampling, is_first = new.sampling, len(new.token_ids) == new.num_prompt_tokens and new.fork_of is None
            if sampling.wants_logprobs:
                given = sampling.logprob_token_ids or ()
                drawn[place] = tuple(_equally_likely(token, sampling.logprobs or 0, given) for token in token_ids)
            if sampling.prompt_logprobs is not None and is_first:
                of_prompts[place] = tuple(_equally_likely(t, sampling.prompt_logprobs) for t in new.token_ids[1:])
                self.asked[row] = replace(new, sampling=replace(sampling, prompt_logprobs=None))  # they come once
        return replace(output, logprobs=tuple(drawn), prompt_logprobs=of_prompts)


def _equally_likely(token_id: int, num_top: int, given: Sequence[int] = ()) -> TokenLogprobs:
    value = -math.log(VOCAB_SIZE)
    top = range(VOCAB_SIZE if num_top == -1 else num_top)
    return TokenLogprobs(
        token_id, value, token_id + 1, tuple((i, value) for i in top), tuple((i, value) for i in given)
    )


def next_letter(token_ids: list[int], sequence_index: int) -> int:
    """The alphabet goes round; a sample of index i begins i letters on."""
    return ord("a") + (len(token_ids) + sequence_index) % 26


def byte_engine(
    gate: Gate | None = None,
    *,
    num_blocks: int = 200,
    max_num_seqs: int = 4,
    budget: int = 16,
    max_model_len: int = 400,
    prefix_cache: bool = True,
) -> AsyncEngine:
    """Make an engine; the caller closes it."""
    executor = _GatedExecutor(BLOCK_SIZE, next_letter)
    executor.gate, executor.asked = gate or Gate(), {}
    scheduler = Scheduler(
        CacheManager(num_blocks, BLOCK_SIZE, prefix_cache=prefix_cache, max_num_pinned=num_blocks // 4),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        eos_token_ids=[EOS],
    )
    tokenizer = Tokenizer(_Bytes(), _RULES)
    text = TextProcessor(
        tokenizer,
        ChatTemplate(_TEMPLATE, {}),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        vocab_size=VOCAB_SIZE,
        grammars=GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS]),
        eos_token_ids=[EOS],
    )
    info = EngineInfo(
        model_name="bytes",
        architecture="fake",
        dtype="float32",
        kv_dtype="float32",
        mode="exact",
        device="cpu",
        kernel_backend="fake",
        deterministic=True,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        kv_cache_bytes=0,
        kv_cache_reason="fake",
        num_parameters=0,
        load_seconds=0.0,
    )
    return AsyncEngine(Engine(scheduler, executor), text, info)
