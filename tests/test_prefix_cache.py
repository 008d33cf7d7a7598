"""The prefix cache on the real model: what is hit, whole or in part, changes no bit of an answer."""

import re
from pathlib import Path

import pytest

from octavo_engine import LLM, CachedTokens, PinLimitReached, RequestOutput, SamplingParams, UnknownPin

pytestmark = pytest.mark.model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "prefix-cache.md"
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=8, logprobs=5, ignore_eos=True)
OPTIONS = {"show_progress": False, "num_blocks": 200, "block_size": 16, "max_model_len": 512}


def conversation(llm: LLM) -> tuple[list[int], list[list[int]]]:
    """Return a beginning of 45 tokens and prompts that leave it at different places, one of them at its end."""
    text = "Once upon a time there was a lighthouse keeper who counted ships. " * 5
    beginning = llm._text.encode_prompt(text)[:45]
    other = llm._text.encode_prompt("But one evening nobody came home, and the light went out over the sea.")
    return beginning, [beginning[:at] + other for at in (7, 16, 30, 33, 45)]


def generate(llm: LLM, prompt: list[int]) -> list[RequestOutput]:
    """Answer a prompt greedily and by drawing, in the same steps."""
    return llm.generate([{"prompt_token_ids": prompt}] * 2, [GREEDY, SAMPLED])


def test_answers_are_the_same_bit_for_bit_whatever_was_hit() -> None:
    with LLM(prefix_cache=False, **OPTIONS) as llm:
        beginning, prompts = conversation(llm)
        expected = [[output.outputs for output in generate(llm, prompt)] for prompt in prompts]
    with LLM(**OPTIONS) as llm:
        (warmed,) = llm.warm({"prompt_token_ids": beginning + beginning[:3]})
        assert (warmed.cached, warmed.num_warm_tokens) == (CachedTokens(), 48)
        outputs = [generate(llm, prompt) for prompt in prompts]
        stats = llm.stats()
    assert [[output.outputs for output in both] for both in outputs] == expected
    assert all(greedy.cached == sampled.cached for greedy, sampled in outputs)
    # What others add to the cache begins with a text that agrees with the next one no further than the beginning does.
    assert [greedy.cached for greedy, _ in outputs] == [
        CachedTokens(full=0, partial=7),
        CachedTokens(full=16, partial=0),
        CachedTokens(full=16, partial=14),
        CachedTokens(full=32, partial=1),
        CachedTokens(full=32, partial=13),
    ]
    assert stats.cached_prompt_tokens == CachedTokens(full=192, partial=70)
    lookups = stats.cache.lookups
    assert (lookups.num_full_hit_tokens, lookups.num_partial_hit_tokens) == (192, 70)
    assert lookups.num_query_tokens == 48 + 2 * sum(map(len, prompts))


def test_a_prompt_that_two_requests_compute_at_once_is_held_once_and_answered_alike() -> None:
    with LLM(prefix_cache=False, **OPTIONS) as llm:
        _, prompts = conversation(llm)
        (expected,) = llm.generate({"prompt_token_ids": prompts[-1]}, SAMPLED)
    with LLM(**OPTIONS) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompts[-1]}] * 3, SAMPLED)
        stats = llm.stats().cache
    assert [output.outputs for output in outputs] == [expected.outputs] * 3
    assert [output.cached for output in outputs] == [CachedTokens()] * 3
    # Each of the two that came to nothing gave three blocks of the prompt back; of what they drew they may give more.
    assert stats.num_deduplicated >= 2 * (len(prompts[-1]) // 16)


def test_pins_stay_and_salts_keep_apart() -> None:
    with LLM(**OPTIONS, max_pinned_share=0.03) as llm:  # 5 of 199 blocks
        beginning, prompts = conversation(llm)
        pin = llm.pin({"prompt_token_ids": beginning, "cache_salt": "one"})
        assert (pin.num_tokens, pin.num_blocks, llm.pins()) == (32, 2, [pin])
        with pytest.raises(PinLimitReached, match="takes 5 blocks, pins hold 2 and may hold 5"):
            llm.pin({"prompt_token_ids": beginning + beginning})
        salted = [{"prompt_token_ids": prompts[2], "cache_salt": salt} for salt in ("one", "two")]
        own, other = llm.generate(salted, GREEDY)
        assert (own.cached, other.cached) == (CachedTokens(full=16, partial=14), CachedTokens())
        assert own.outputs == other.outputs
        llm.reset_prefix_cache()
        assert llm.pins() == []
        with pytest.raises(UnknownPin):
            llm.unpin(pin)
        assert llm.stats().cache.num_used == 0


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    pinned, hit = capsys.readouterr().out.splitlines()
    assert int(hit.split()[0]) >= int(pinned.split()[0]) >= 48
