"""The text side of an engine: the TextProcessor of a source, with the sampling that its files advise."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from octavo_engine.beam_limits import BeamLimits
from octavo_engine.cache_plan import num_pinnable
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequest
from octavo_engine.runner.memory import MemoryPlan
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.structured.compiler import GrammarCompiler
from octavo_engine.text.answer_format import AnswerFormat
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import Source

_log = logging.getLogger(__name__)

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def make_text_processor(
    source: Source, tokenizer: Tokenizer, grammars: GrammarCompiler, config: EngineConfig, plan: MemoryPlan
) -> TextProcessor:
    """Return what stands between text and an engine's tokens."""
    template = source.chat_template()
    return TextProcessor(
        tokenizer,
        template,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=source.config.vocab_size,
        beam_limits=BeamLimits(
            max_width=min(config.max_num_seqs, config.max_num_batched_tokens),
            num_blocks=plan.num_blocks - 1 - num_pinnable(config, plan),
            block_size=config.block_size,
        ),
        default_sampling=_default_sampling(source.generation_config),
        grammars=grammars,
        answers=AnswerFormat.of(
            "" if template is None else template.source, config.tool_parser, config.reasoning_parser
        ),
        eos_token_ids=source.eos_token_ids,
    )


def _default_sampling(advised: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a generation_config.json advises and this engine can do, and tell the user of both."""
    taken: dict[str, Any] = {}
    for name in _SAMPLING_DEFAULTS:
        value = advised.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except InvalidRequest as error:
            _log.warning("generation_config.json is not followed: %s", error)
        else:
            taken[name] = value
    if taken:
        described = ", ".join(f"{name}={value}" for name, value in taken.items())
        _log.info("sampling defaults from generation_config.json: %s", described)
    return taken
