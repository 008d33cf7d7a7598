"""An engine without a model for the server's tests across packages: bytes are its tokens, and its memory is exact.

The scheduler, the cache and the asyncio front end are the real ones; a fake executor stands in for the model. It says
the letters of the alphabet in turn, and a gate lets so many steps through, so that a test decides what happens between.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from octavo_engine.api import EngineInfo
from octavo_engine.async_engine import AsyncEngine
from octavo_engine.batch import ScheduledBatch
from octavo_engine.engine import Engine
from octavo_engine.executor.base import Pending
from octavo_engine.executor.fake import FakeExecutor
from octavo_engine.scheduler import Scheduler
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer, TokenizerRules
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

    def submit(self, batch: ScheduledBatch) -> Pending:
        assert self.gate.steps.acquire(timeout=20), "the gate was never opened"
        return super().submit(batch)


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
    executor.gate = gate or Gate()
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
