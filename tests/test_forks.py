"""Forks on the real model: the documentation's tree search runs, and a branch draws what it would draw alone."""

import re
from pathlib import Path

import pytest

from octavo_engine import LLM, SamplingParams

pytestmark = pytest.mark.model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "forks.md"


def test_the_tree_search_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    said = capsys.readouterr().out
    assert said.startswith("The lighthouse keeper")
    shared, total = map(int, re.findall(r"(\d+) of (\d+) prompt tokens", said)[0])
    assert shared > 0.8 * total


def test_a_branch_draws_what_it_draws_without_its_parent() -> None:
    sampled = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=20, logprobs=1, ignore_eos=True)
    with LLM(show_progress=False, num_blocks=200, prefix_cache=False) as llm:
        (parent,) = llm.generate(
            "Once upon a time", SamplingParams(n=3, seed=1, max_tokens=21, ignore_eos=True), keep=True
        )
        for at in (0, 7, 12, 21):
            (branch,) = llm.fork(parent.branch(2, at=at, continuation=" and"), sampled)
            (alone,) = llm.generate({"prompt_token_ids": branch.prompt_token_ids}, sampled)
            assert branch.prompt_token_ids[: len(parent.prompt_token_ids)] == parent.prompt_token_ids
            assert branch.outputs == alone.outputs
            assert branch.num_cached_tokens == len(parent.prompt_token_ids) + min(at, 20)
            assert alone.num_cached_tokens == 0
        llm.release(parent)
        assert llm.stats().cache.num_used == 0
