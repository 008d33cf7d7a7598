"""Beam search on tiny models against Transformers' `generate`, and how the runner keeps the rows of beams."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runner needs the extra octavo-engine[local]")
transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.engine import Engine
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.models.llama import Llama
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import make_runner
from octavo_engine.types import FinishReason, Request, SamplingParams, SequenceUpdate, TokenSpan
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource
from octavo_kvcache import CacheManager

VOCAB_SIZE = 131
EOS = 2
PROMPTS = [[5, 17, 99, 3], [64, 64, 8, 120, 33, 7, 7, 1, 90], [11]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Any]:
    """A tiny model of ours, and Transformers' with the same weights."""
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return load_model(FolderSource(folder), device=torch.device("cpu"), dtype=torch.float32), model


def make_engine(model: Llama, *, num_blocks: int = 256, max_num_seqs: int = 32) -> Engine:
    runner = make_runner(model, num_blocks=num_blocks, block_size=4, max_num_seqs=max_num_seqs)
    scheduler = Scheduler(
        CacheManager(num_blocks, 4),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        max_model_len=200,
        eos_token_ids=[EOS],
    )
    return Engine(scheduler, InlineExecutor(runner))


def request(place: int, prompt: list[int], beams: BeamSearchParams | None = None, **sampling) -> Request:
    return Request(
        request_id=str(place),
        inputs=(TokenSpan(tuple(prompt)),),
        sampling=SamplingParams(seed=place, **sampling) if beams is None else beams.sampling(),
        beams=beams,
    )


def run(engine: Engine) -> dict[str, list[SequenceUpdate]]:
    updates: dict[str, list[SequenceUpdate]] = {}
    while engine.has_work:
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
    assert engine.scheduler.cache.stats().num_used == 0
    return updates


def theirs(model: Any, prompt: list[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=params.max_tokens,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            do_sample=False,
            eos_token_id=[EOS, *params.stop_token_ids],
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = []
    for tokens, score in zip(
        output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True
    ):
        ends = [i + 1 for i, token_id in enumerate(tokens) if token_id in (EOS, *params.stop_token_ids)]
        found.append((tokens[: ends[0]] if ends else tokens, score))
    return found


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_searches_of_a_tiny_model_equal_transformers(checkpoint, width: int, early, penalty: float):
    ours, model = checkpoint
    params = BeamSearchParams(
        beam_width=width, max_tokens=14, early_stopping=early, length_penalty=penalty, stop_token_ids=[40, 41, 42, 43]
    )
    engine = make_engine(ours)
    for place, prompt in enumerate(PROMPTS):
        engine.add(request(place, prompt, params))
    updates = run(engine)
    for place, prompt in enumerate(PROMPTS):
        expected = theirs(model, prompt, params)
        assert [list(u.token_ids) for u in updates[str(place)]] == [tokens for tokens, _ in expected]
        assert [u.score for u in updates[str(place)]] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_beams_change_nothing_for_those_who_run_beside_them(checkpoint):
    ours, _ = checkpoint
    others = [
        request(1, PROMPTS[1], temperature=0, max_tokens=12, ignore_eos=True),
        request(2, PROMPTS[2], temperature=1.0, n=3, max_tokens=9, ignore_eos=True),
        request(3, PROMPTS[0], temperature=0.7, repetition_penalty=1.3, logprobs=2, max_tokens=12, ignore_eos=True),
    ]
    beams = BeamSearchParams(beam_width=4, max_tokens=10, logprobs=3)

    def outputs(requests: list[Request]) -> dict[tuple[str, int], list]:
        engine = make_engine(ours)
        for one in requests:
            engine.add(one)
        found: dict[tuple[str, int], list] = {}
        for request_id, updates in run(engine).items():
            for update in updates:
                found.setdefault((request_id, update.index), []).append((update.token_ids, update.logprobs))
        return found

    together = outputs([*others, request(0, PROMPTS[0], beams)])
    assert {key: value for key, value in together.items() if key[0] != "0"} == outputs(others)
    assert {key: value for key, value in together.items() if key[0] == "0"} == outputs([request(0, PROMPTS[0], beams)])


def test_preemption_changes_no_hypothesis(checkpoint):
    ours, _ = checkpoint
    params = BeamSearchParams(beam_width=4, max_tokens=30, ignore_eos=True)
    found = []
    for num_blocks in (256, 36):
        engine = make_engine(ours, num_blocks=num_blocks)
        for place, prompt in enumerate(PROMPTS):
            engine.add(request(place, prompt, params))
        found.append({key: [(u.token_ids, u.score) for u in updates] for key, updates in run(engine).items()})
    assert engine.scheduler.counters.num_preemptions > 0
    assert found[0] == found[1]


def test_a_model_that_answers_no_numbers_fails_the_search_alone(checkpoint):
    ours, _ = checkpoint
    engine = make_engine(ours)
    engine.add(request(0, PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=8)))
    engine.add(request(1, PROMPTS[1], temperature=0, max_tokens=8, ignore_eos=True))
    engine.step()
    scheduler = engine.scheduler
    block = scheduler.cache.block_ids(scheduler.sequences("0")[0].seq_id)[0][0]
    storage = engine._executor._runner.storage
    for layer in range(storage.num_layers):
        for cache in storage.layer(layer):
            cache[block] = float("nan")
    updates = run(engine)
    assert [u.finish_reason for u in updates["0"]] == [FinishReason.ERROR]
    assert sum(len(u.token_ids) for u in updates["1"]) == 7  # and one before
