"""Beam search on tiny models against Transformers' `generate`, and how the runner keeps the rows of beams."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runner needs the extra octavo-engine[local]")
transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")

from torch import Tensor

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.engine import Engine
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.models.llama import Llama
from octavo_engine.scheduler import Scheduler
from octavo_engine.testing import make_runner
from octavo_engine.text.stop_tokens import StopTokens
from octavo_engine.types import FinishReason, Request, SamplingParams, SequenceUpdate, TokenSpan
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import FolderSource
from octavo_kvcache import CacheManager

VOCAB_SIZE = 131
EOS = 2
PROMPTS = [[5, 17, 99, 3], [64, 64, 8, 120, 33, 7, 7, 1, 90], [11]]
TEXTS = ["abcdef", *(f"{'abc'[i % 3]}{'de'[i % 2]}{i}" for i in range(1, VOCAB_SIZE))]  # stop strings span tokens
TOKENIZER: Any = SimpleNamespace(special_token_ids=frozenset(), token_bytes=lambda token_id: TEXTS[token_id].encode())
STOP_TOKENS = StopTokens(TOKENIZER, VOCAB_SIZE)


class Rule(transformers.LogitsProcessor):
    """What Transformers has no processor of its own for, in its form."""

    def __init__(self, change: Callable[[list[int], Tensor], Tensor]) -> None:
        self.change = change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([self.change(ids, row) for ids, row in zip(input_ids.tolist(), scores, strict=True)])


def slower(token_ids: list[int], scores: Tensor) -> Tensor:
    """Favour tokens near the last one."""
    return scores - (torch.arange(VOCAB_SIZE) - token_ids[-1]).abs() / 40


def penalised(num_prompt_tokens: int) -> Rule:
    """Presence 0.4 and frequency 0.6, as OpenAI's documentation has them."""

    def change(token_ids: list[int], scores: Tensor) -> Tensor:
        counts = torch.bincount(torch.tensor(token_ids[num_prompt_tokens:], dtype=torch.int64), minlength=VOCAB_SIZE)
        return scores - 0.6 * counts - 0.4 * (counts > 0)

    return Rule(change)


def only(*allowed: int) -> Rule:
    keep = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    keep[list(allowed)] = True
    return Rule(lambda _, scores: scores.masked_fill(~keep, float("-inf")))


def without_repeats(token_ids: list[int], scores: Tensor) -> Tensor:
    """DRY with multiplier 2, base 1.5 and allowed length 1, by looking back from every earlier token."""
    longest: dict[int, int] = {}
    last = len(token_ids) - 1
    for place in range(last):
        length = 0
        while length <= place and token_ids[place - length] == token_ids[last - length]:
            length += 1
        following = token_ids[place + 1]
        longest[following] = max(longest.get(following, 0), length)
    scores = scores.clone()
    for token_id, length in longest.items():
        scores[token_id] -= 2 * 1.5 ** (length - 1) if length else 0
    return scores


STOPS = ["2b", "7a", "ce5"]
ODD = range(1, VOCAB_SIZE, 2)
RULES: dict[str, tuple[dict[str, Any], Callable[[list[int]], dict[str, Any]]]] = {
    "repetition": ({"repetition_penalty": 1.4}, lambda _: {"repetition_penalty": 1.4}),
    "counts": (
        {"presence_penalty": 0.4, "frequency_penalty": 0.6},
        lambda prompt: {"logits_processor": [penalised(len(prompt))]},
    ),
    "bias": ({"logit_bias": {9: 3.0, 17: -4.0}}, lambda _: {"sequence_bias": {(9,): 3.0, (17,): -4.0}}),
    "allowed": ({"allowed_token_ids": [EOS, *ODD]}, lambda _: {"logits_processor": [only(EOS, *ODD)]}),
    "bad words": (
        {"bad_words_ids": [[40], [8, 120], [3, 41]], "logit_bias": {8: 4.0, 120: 4.0, 41: 4.0}},
        lambda _: {"bad_words_ids": [[40], [8, 120], [3, 41]], "sequence_bias": {(8,): 4.0, (120,): 4.0, (41,): 4.0}},
    ),
    "least length": (
        {"min_tokens": 9, "logit_bias": {EOS: 5.0}},
        lambda _: {"min_new_tokens": 9, "sequence_bias": {(EOS,): 5.0}},
    ),
    "dry": (
        {"dry_multiplier": 2.0, "dry_base": 1.5, "dry_allowed_length": 1, "logit_bias": dict.fromkeys((8, 9, 11), 6.0)},
        lambda _: {
            "sequence_bias": {(8,): 6.0, (9,): 6.0, (11,): 6.0},
            "logits_processor": [Rule(without_repeats)],
        },
    ),
    "processor": ({"logits_processors": [slower]}, lambda _: {"logits_processor": [Rule(slower)]}),
    "stop strings": ({"stop": STOPS}, lambda _: {"stop_strings": STOPS, "tokenizer": transformers_tokenizer()}),
    "together": (
        {
            "stop": STOPS, "stop_token_ids": [40, 41], "repetition_penalty": 1.2, "logit_bias": {9: 2.0},
            "bad_words_ids": [[33]], "logits_processors": [slower],
        },
        lambda _: {
            "stop_strings": STOPS, "tokenizer": transformers_tokenizer(), "repetition_penalty": 1.2,
            "sequence_bias": {(9,): 2.0}, "bad_words_ids": [[33]], "logits_processor": [Rule(slower)],
        },
    ),
}  # fmt: skip
"""By name: fields of ours, and what says the same to Transformers, given the prompt."""


EVERY_RULE: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "dry_multiplier": 1.0,
    "dry_allowed_length": 1,
    "logit_bias": {9: 2.0},
    "bad_words_ids": [[33], [9, 9]],
    "allowed_token_ids": list(range(3, 100)),
    "logits_processors": [slower],
    "min_tokens": 25,
    "stop": STOPS,
    "stop_token_ids": [40],
}


@functools.cache
def transformers_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {text: token_id for token_id, text in enumerate(TEXTS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=TEXTS[1]))
    backend.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


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


def request_of(place: int | str, prompt: list[int], beams: BeamSearchParams | None = None, **sampling) -> Request:
    stops = None
    if beams is not None and beams.stop:
        stops = STOP_TOKENS.automaton(beams.sampling().stop_strings, skip_special_tokens=False)
    return Request(
        request_id=str(place),
        inputs=(TokenSpan(tuple(prompt)),),
        sampling=SamplingParams(seed=int(place), **sampling) if beams is None else beams.sampling(),
        beams=beams,
        stops=stops,
    )


def run(engine: Engine) -> dict[str, list[SequenceUpdate]]:
    updates: dict[str, list[SequenceUpdate]] = {}
    while engine.has_work:
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
    assert engine.scheduler.cache.stats().num_used == 0
    return updates


def theirs(model: Any, prompt: list[int], params: BeamSearchParams, **rules: Any) -> list[tuple[list[int], float]]:
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
            **rules,
        )
    ends = {EOS, *params.stop_token_ids}
    found = []
    for tokens, score in zip(
        output.sequences[:, len(prompt) :].tolist(), output.sequences_scores.tolist(), strict=True
    ):
        length = 1
        while length < len(tokens) and tokens[length - 1] not in ends and not holds_stop(tokens[:length], params):
            length += 1
        found.append((tokens[:length], score))
    return found


def holds_stop(tokens: list[int], params: BeamSearchParams) -> bool:
    text = "".join(TEXTS[token_id] for token_id in tokens)
    return any(stop in text for stop in params.stop)


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
        engine.add(request_of(place, prompt, params))
    updates = run(engine)
    for place, prompt in enumerate(PROMPTS):
        expected = theirs(model, prompt, params)
        assert [list(u.token_ids) for u in updates[str(place)]] == [tokens for tokens, _ in expected]
        assert [u.score for u in updates[str(place)]] == pytest.approx([score for _, score in expected], abs=1e-4)


PLAIN = BeamSearchParams(beam_width=4, max_tokens=14)


@pytest.fixture(scope="module")
def found_by_rule(checkpoint) -> dict[str, list[SequenceUpdate]]:
    """What searches of two prompts under every rule find side by side."""
    engine = make_engine(checkpoint[0], num_blocks=512, max_num_seqs=128)
    for name, (fields, _) in RULES.items():
        for place, prompt in enumerate(PROMPTS[:2]):
            engine.add(request_of(f"{name} {place}", prompt, replace(PLAIN, **fields)))
    return run(engine)


@pytest.fixture(scope="module")
def plain(checkpoint) -> list[list[tuple[list[int], float]]]:
    """What Transformers finds without rules."""
    return [theirs(checkpoint[1], prompt, PLAIN) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("name", RULES)
def test_searches_under_rules_equal_transformers(checkpoint, found_by_rule, plain, name: str):
    fields, rules = RULES[name]
    expected = [theirs(checkpoint[1], prompt, replace(PLAIN, **fields), **rules(prompt)) for prompt in PROMPTS[:2]]
    for place, hypotheses in enumerate(expected):
        own = found_by_rule[f"{name} {place}"]
        assert [list(u.token_ids) for u in own] == [tokens for tokens, _ in hypotheses]
        assert [u.score for u in own] == pytest.approx([score for _, score in hypotheses], abs=1e-4)
    assert expected != plain


def test_a_search_that_has_ended_leaves_no_rule_behind(checkpoint):
    engine = make_engine(checkpoint[0])
    engine.add(request_of(0, PROMPTS[0], replace(PLAIN, repetition_penalty=1.4, logit_bias={9: 3.0})))
    run(engine)
    engine.add(request_of(1, PROMPTS[1], temperature=0, max_tokens=2))  # its step tells the runner who has left
    run(engine)
    assert not engine._executor._runner._sampling._rules._used


def test_beams_change_nothing_for_those_who_run_beside_them(checkpoint):
    ours, _ = checkpoint
    others = [
        request_of(1, PROMPTS[1], temperature=0, max_tokens=12, ignore_eos=True),
        request_of(2, PROMPTS[2], temperature=1.0, n=3, max_tokens=9, ignore_eos=True),
        request_of(3, PROMPTS[0], temperature=0.7, repetition_penalty=1.3, logprobs=2, max_tokens=12, ignore_eos=True),
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

    together = outputs([*others, request_of(0, PROMPTS[0], beams)])
    assert {key: value for key, value in together.items() if key[0] != "0"} == outputs(others)
    assert {key: value for key, value in together.items() if key[0] == "0"} == outputs(
        [request_of(0, PROMPTS[0], beams)]
    )


@pytest.mark.parametrize("fields", [{}, EVERY_RULE], ids=["plain", "rules"])
def test_preemption_changes_no_hypothesis(checkpoint, fields: dict[str, Any]):
    ours, _ = checkpoint
    params = BeamSearchParams(beam_width=4, max_tokens=30, ignore_eos=True, **fields)
    found = []
    for num_blocks in (256, 36):
        engine = make_engine(ours, num_blocks=num_blocks)
        for place, prompt in enumerate(PROMPTS):
            engine.add(request_of(place, prompt, params))
        found.append({key: [(u.token_ids, u.score) for u in updates] for key, updates in run(engine).items()})
    assert engine.scheduler.counters.num_preemptions > 0
    assert found[0] == found[1]


def test_a_model_that_answers_no_numbers_fails_the_search_alone(checkpoint):
    ours, _ = checkpoint
    engine = make_engine(ours)
    engine.add(request_of(0, PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=8)))
    engine.add(request_of(1, PROMPTS[1], temperature=0, max_tokens=8, ignore_eos=True))
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
