"""Models split over ranks, by heads and by experts, draw the tokens of one process on whatever backend runs the tests.

They are so small, and their answers so short, that Triton's interpreter gets through them.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import torch

from octavo_engine import LLM, SamplingParams
from octavo_engine.layers import experts
from octavo_engine.parallel import split
from octavo_engine.parallel.thread_rank import ThreadRank
from octavo_engine.quant import choose

transformers = pytest.importorskip("transformers")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROMPTS = [(3, 14, 15, 9, 26), (58, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
SPLITS: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "TP 2": ("Llama", {"num_key_value_heads": 4}, {"tensor_parallel_size": 2}),
    "TP 4": ("Llama", {"num_key_value_heads": 4}, {"tensor_parallel_size": 4}),
    "TP 4, KV heads on two ranks each": ("Llama", {"num_key_value_heads": 2}, {"tensor_parallel_size": 4}),
    "EP 2": (
        "Mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 3},
        {"tensor_parallel_size": 2, "expert_parallel": True},
    ),
}


@pytest.fixture(autouse=True)
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks be threads; an interpreted kernel changes `triton.language` while it runs, so one runs at a time."""
    monkeypatch.setattr(split, "WorkerProcess", ThreadRank)
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        lock, run = threading.Lock(), GridExecutor.__call__

        def alone(self: Any, *arguments: Any, **options: Any) -> Any:
            with lock:
                return run(self, *arguments, **options)

        monkeypatch.setattr(GridExecutor, "__call__", alone)


def checkpoint(folder: Path, kind: str, sizes: dict[str, int]) -> Path:
    torch.manual_seed(17)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **sizes,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def answers(folder: Path, **options: Any) -> list[tuple[int, ...]]:
    with LLM(str(folder), num_blocks=9, max_num_seqs=2, num_threads=1, show_progress=False, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], GREEDY)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("kind", "sizes", "options"), SPLITS.values(), ids=SPLITS)
def test_ranks_draw_the_tokens_of_one_process(
    tmp_path: Path,
    byte_tokenizer: Callable[[Path, int], None],
    kind: str,
    sizes: dict[str, int],
    options: dict[str, Any],
) -> None:
    folder = checkpoint(tmp_path, kind, sizes)
    byte_tokenizer(folder / "tokenizer.json", 67)
    assert answers(folder, **options) == answers(folder)


@pytest.mark.skipif(not INTERPRETED, reason="the kernel for all experts at once is Triton's")
def test_experts_in_one_kernel_are_dealt_out_too(
    tmp_path: Path, byte_tokenizer: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nothing is packed; of three experts one rank has one and the other two."""
    num_experts: list[int] = []

    def counted(x: torch.Tensor, gate_up: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        num_experts.append(len(gate_up))
        return fused_moe(x, gate_up, *rest)

    fused_moe = experts.fused_moe
    monkeypatch.setattr(experts, "fused_moe", counted)
    monkeypatch.setattr(choose, "has_native_products", lambda device: False)
    kind, sizes, options = SPLITS["EP 2"]
    folder = checkpoint(tmp_path, kind, sizes)
    byte_tokenizer(folder / "tokenizer.json", 67)
    expected = answers(folder)
    assert set(num_experts) == {3}
    num_experts.clear()
    assert answers(folder, **options) == expected
    assert set(num_experts) == {1, 2}
