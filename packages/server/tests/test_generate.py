"""The interface of text-generation-inference: shapes, parameters, events and errors."""

import json

import pytest

EOS = 256


def events_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data:{") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_a_text_goes_on(client, engine):
    answer = client.post("/generate", json={"inputs": "Say"})
    assert answer.json() == {"generated_text": " Paris."}
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.logprobs) == (0.0, 100, None)
    assert client.post("/", json={"inputs": "Say"}).json() == [{"generated_text": " Paris."}]


def test_details_have_every_token_and_the_end_token_too(client):
    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "do_sample": True, "seed": 2**63}
    answer = client.post("/generate", json={"inputs": "ab", "parameters": parameters}).json()
    details = answer["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("eos_token", 8, 2**63)
    assert details["prefill"] == [
        {"id": 97, "text": "a", "logprob": None},
        {"id": 98, "text": "b", "logprob": -0.5},
    ]
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == answer["generated_text"]
    assert details["tokens"][-1] == {"id": EOS, "text": "<eos>", "logprob": -0.5, "special": True}
    assert details["top_tokens"][0] == [
        {"id": 32, "text": " ", "logprob": -0.5, "special": False},
        {"id": 33, "text": "!", "logprob": -1.5, "special": False},
    ]


def test_greedy_texts_have_no_seed_and_no_prefill(client):
    details = client.post("/generate", json={"inputs": "a", "parameters": {"details": True}}).json()["details"]
    assert (details["seed"], details["prefill"]) == (None, [])
    assert "top_tokens" not in details


def test_a_stream_has_an_event_for_each_token(client):
    body = {"inputs": "ab", "parameters": {"details": True, "return_full_text": True}}
    events = events_of(client.post("/generate_stream", json=body))
    assert [event["index"] for event in events] == list(range(1, 9))
    assert "".join(event["token"]["text"] for event in events if not event["token"]["special"]) == " Paris."
    *before, last = events
    assert all((event["generated_text"], event["details"]) == (None, None) for event in before)
    assert last["generated_text"] == "ab Paris."
    assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 8, "seed": None, "input_length": 2}
    assert len(events_of(client.post("/", json=body | {"stream": True}))) == 8


def test_a_character_of_several_tokens_comes_with_the_last(client, engine):
    engine.replies = ["é🙂"]
    events = events_of(client.post("/generate_stream", json={"inputs": "a"}))
    assert [event["token"]["text"] for event in events] == ["", "é", "", "", "", "🙂", "<eos>"]
    assert events[-1]["generated_text"] == "é🙂"


def test_stop_sequences_end_the_text_and_stay_in_it(client):
    body = {"inputs": "a", "parameters": {"stop": ["ri"], "details": True}}
    answer = client.post("/generate", json=body).json()
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == (" Pari", "stop_sequence")
    assert events_of(client.post("/generate_stream", json=body))[-1]["generated_text"] == " Pari"


def test_length_ends_the_text(client):
    body = {"inputs": "a", "parameters": {"max_new_tokens": 3, "details": True}}
    assert client.post("/generate", json=body).json()["details"]["finish_reason"] == "length"


def test_the_best_of_several_comes_first(client, engine):
    engine.replies = [" one", " two"]  # the fake engine likes later ones better
    body = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "details": True}}
    answer = client.post("/generate", json=body).json()
    assert answer["generated_text"] == " two"
    (other,) = answer["details"]["best_of_sequences"]
    assert (other["generated_text"], other["finish_reason"], len(other["tokens"])) == (" one", "eos_token", 5)


def test_parameters_reach_the_engine_under_its_names(client, engine):
    parameters = {
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.9,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "seed": 5,
        "truncate": 2,
        "max_new_tokens": 7,
    }
    client.post("/generate", json={"inputs": "abcd", "parameters": parameters})
    request = engine.requests[0]
    sampling = request.sampling
    assert bytes(request.prompt_token_ids) == b"cd"
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 10, 0.9, 0.8)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.seed) == (1.1, 0.2, 5)


@pytest.mark.parametrize(
    ("grammar", "kept"),
    [
        ({"type": "regex", "value": "[0-9]+"}, "regex"),
        ({"type": "json", "value": {"type": "object"}}, "json"),
        ({"type": "json", "value": '{"type": "object"}'}, "json"),
        ({"type": "json_schema", "value": {"name": "x", "schema": {"type": "object"}}}, "json"),
    ],
    ids=["regex", "schema", "text of a schema", "named schema"],
)
def test_grammars_constrain_the_text(client, engine, grammar, kept):
    pytest.importorskip("llguidance", reason="grammars need the extra [structured]")
    assert client.post("/generate", json={"inputs": "a", "parameters": {"grammar": grammar}}).status_code == 200
    assert getattr(engine.requests[0].sampling.structured_outputs, kept) is not None


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": "a" * 300}, "maximum context length"),
        ({"inputs": "a", "parameters": {"watermark": True}}, "parameters.watermark"),
        ({"inputs": "a", "parameters": {"adapter_id": "x"}}, "parameters.adapter_id"),
        ({"inputs": "a", "parameters": {"temperature": 0}}, "parameters.temperature"),
        ({"inputs": "a", "parameters": {"top_p": 1.5}}, "parameters.top_p"),
        ({"inputs": "a", "parameters": {"stop": ["a"] * 5}}, "parameters.stop"),
        ({"inputs": "a", "parameters": {"best_of": 2}}, "parameters.best_of"),
        ({"inputs": "a", "parameters": {"best_of": 100, "do_sample": True}}, "parameters.best_of"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "lark", "value": "x"}}}, "parameters.grammar"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "json", "value": 5}}}, "parameters.grammar"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_mistakes_are_422_in_tgis_shape(client, engine, path, body, word):
    response = client.post(path, json=body)
    assert (response.status_code, engine.requests) == (422, []), response.text
    assert response.json().keys() == {"error", "error_type"}
    assert response.json()["error_type"] == "validation"
    assert word in response.json()["error"]


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}], ids=str)
def test_what_a_stream_cannot_have_is_refused(client, parameters):
    assert client.post("/generate_stream", json={"inputs": "a", "parameters": parameters}).status_code == 422


def test_failures_are_told_in_tgis_shape(client, engine):
    engine.fail_after = 2
    response = client.post("/generate", json={"inputs": "a"})
    assert (response.status_code, response.json()["error_type"]) == (500, "generation")
    last = events_of(client.post("/generate_stream", json={"inputs": "a"}))[-1]
    assert last == {"error": "the engine could not compute this request", "error_type": "generation"}
    engine.sleep_level = 1
    response = client.post("/generate_stream", json={"inputs": "a"})
    assert (response.status_code, response.json()["error_type"]) == (503, "overloaded")


def test_info_has_the_limits(client):
    info = client.get("/info").json()
    assert (info["model_id"], info["model_dtype"], info["max_total_tokens"]) == ("org/fake-model", "torch.float32", 200)


def test_hugging_faces_client_reads_it_all(serve, engine):
    hub = pytest.importorskip("huggingface_hub", reason="its client is the oracle")
    client = hub.InferenceClient(model=serve(engine))
    assert client.text_generation("a") == " Paris."
    assert client.text_generation("a", details=True, decoder_input_details=True).details.generated_tokens == 8
    assert "".join(client.text_generation("a", stream=True)) == " Paris.<eos>"
    last = [*client.text_generation("a", stream=True, details=True)][-1]
    assert (last.generated_text, last.details.finish_reason) == (" Paris.", "eos_token")
    with pytest.raises(hub.errors.ValidationError, match="watermark"):
        client.text_generation("a", watermark=True)
