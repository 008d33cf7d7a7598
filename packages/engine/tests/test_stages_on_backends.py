"""Models in stages draw the tokens of one process, under the rule of ties, on whatever backend runs the tests.

They are so small, and their answers so short, that Triton's interpreter gets through them.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

from octavo_engine import LLM, SamplingParams
from octavo_engine.parallel import split
from octavo_engine.parallel.thread_rank import ThreadRank

TIE = 5e-4
PROMPTS = [(3, 14, 15, 9, 26), tuple(range(40, 57))]
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@pytest.fixture(autouse=True)
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks be threads; an interpreted kernel changes `triton.language` while it runs, so one runs at a time."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        lock, run = threading.Lock(), GridExecutor.__call__

        def alone(self: Any, *arguments: Any, **options: Any) -> Any:
            with lock:
                return run(self, *arguments, **options)

        monkeypatch.setattr(GridExecutor, "__call__", alone)


def answers(llm: LLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Any]:
    return llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling)


@pytest.mark.parametrize("size", [1, 2], ids=["PP 2", "TP 2 x PP 2"])
def test_stages_draw_the_tokens_of_one_process(save_llama: Callable[..., Path], size: int) -> None:
    folder = save_llama(2)
    options = {"num_blocks": 9, "max_num_seqs": 4, "max_model_len": 32, "num_threads": 1, "show_progress": False}
    with LLM(str(folder), pipeline_parallel_size=2, tensor_parallel_size=size, **options) as llm:
        drawn = [output.outputs[0].token_ids for output in answers(llm, PROMPTS, GREEDY)]
        assert llm.stats().overlap.num_overlapped > 0
    assert [len(token_ids) for token_ids in drawn] == [2, 2]
    followed = [[*prompt, *token_ids] for prompt, token_ids in zip(PROMPTS, drawn, strict=True)]
    with LLM(str(folder), **options) as whole:
        outputs = answers(whole, followed, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = output.prompt_logprobs[len(prompt) :]
        assert len(entries) == 2
        assert all(entry is not None and entry.top[0][1] - entry.logprob <= TIE for entry in entries)
