import asyncio
import json
from typing import Any

import pytest

from octavo_server.errors import ApiError
from octavo_server.exchange import Exchange
from octavo_server.outlet import Outlet
from octavo_server.streaming import ChunkWriter, EventStream, drawn_from, to_json

USER = {"role": "user", "content": "hi"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES = {CHAT: {"messages": [USER]}, TEXT: {"prompt": "abc"}}
both = pytest.mark.parametrize("path", [CHAT, TEXT], ids=["chat", "text"])


def text_of(chunk: Any) -> str:
    choice = chunk["choices"][0]
    return choice["delta"].get("content") or "" if "delta" in choice else choice["text"]


def choice_chunks(events: list[Any]) -> list[Any]:
    return [event for event in events if event != "[DONE]" and event["choices"]]


@both
def test_response_is_an_event_stream_that_ends_with_one_done(client, path):
    response = client.post(path, json={"stream": True, **BODIES[path]})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in response.headers
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.text.count("[DONE]") == 1


@both
def test_id_created_model_and_object_stay_the_same(stream, path):
    heads = {
        (e["id"], e["object"], e["created"], e["model"], e["system_fingerprint"])
        for e in stream(path, **BODIES[path], stream_options={"include_usage": True})[:-1]
    }
    (head,) = heads
    assert head[0].startswith("chatcmpl-" if path == CHAT else "cmpl-")
    assert head[1] == ("chat.completion.chunk" if path == CHAT else "text_completion")


@both
@pytest.mark.parametrize("step", [1, 3, 100])
def test_joined_text_equals_the_whole_answer(client, engine, stream, path, step):
    engine.replies = ["a 😀世界 and more"]
    engine.step = step
    whole = client.post(path, json={**BODIES[path], "max_tokens": 40}).json()["choices"][0]
    expected = whole["message"]["content"] if path == CHAT else whole["text"]
    assert "".join(map(text_of, choice_chunks(stream(path, **BODIES[path], max_tokens=40)))) == expected
    assert expected == "a 😀世界 and more"


@both
def test_each_choice_has_one_finish_reason_at_its_end(engine, stream, path):
    engine.replies = ["a", "bcd"]
    chunks = choice_chunks(stream(path, **BODIES[path], n=2))
    for index in (0, 1):
        reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["index"] == index]
        assert reasons[-1] == "stop"
        assert set(reasons[:-1]) == {None}


def test_chat_begins_with_a_role_chunk_per_choice_and_never_repeats_it(engine, stream):
    engine.replies = ["a", "b"]
    chunks = choice_chunks(stream(CHAT, **BODIES[CHAT], n=2))
    for index in (0, 1):
        first, *rest = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert first["finish_reason"] is None
        assert first["logprobs"] is None
        assert all("role" not in choice["delta"] for choice in rest)
        assert all(choice["delta"].get("content") != "" for choice in rest)


@both
def test_the_last_text_and_the_finish_reason_share_a_chunk(engine, stream, path):
    last = choice_chunks(stream(path, **BODIES[path], max_tokens=3))[-1]
    assert text_of(last) == "a"
    assert last["choices"][0]["finish_reason"] == "length"


@both
def test_no_usage_unless_asked_for(stream, path):
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        assert all("usage" not in event for event in stream(path, **BODIES[path], **options)[:-1])


@both
def test_include_usage_adds_one_chunk_without_choices_before_the_end(client, stream, path):
    *chunks, usage, done = stream(path, **BODIES[path], stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == client.post(path, json=BODIES[path]).json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


@both
def test_continuous_usage_rises_to_the_sum(engine, stream, path):
    engine.replies = ["abc", "de"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, usage, _ = stream(path, **BODIES[path], n=2, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == usage["usage"]["completion_tokens"] == 4 + 3
    assert all(
        c["usage"]["total_tokens"] == c["usage"]["prompt_tokens"] + c["usage"]["completion_tokens"] for c in chunks
    )


@both
@pytest.mark.parametrize("stream_value", [{}, {"stream": False}, {"stream": None}], ids=["absent", "false", "null"])
def test_stream_options_without_stream_are_refused(client, path, stream_value):
    response = client.post(path, json={**BODIES[path], "stream_options": {"include_usage": True}, **stream_value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"


@both
@pytest.mark.parametrize("stop", ["ri", "is.", " Pa", "ris. not"])
def test_a_stop_string_over_several_tokens_never_leaks(engine, stream, path, stop):
    engine.replies = [" Paris. no"]
    expected, found, _ = " Paris. no".partition(stop)
    chunks = choice_chunks(stream(path, **BODIES[path], stop=stop))
    assert "".join(map(text_of, chunks)) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert bool(found) is (stop != "ris. not")


@both
def test_the_beginning_of_a_stop_string_is_flushed_if_it_does_not_come(stream, path):
    assert "".join(map(text_of, choice_chunks(stream(path, **BODIES[path], stop="s.!")))) == " Paris."


def test_echo_comes_in_the_first_chunk_of_each_index(engine, stream):
    engine.replies = ["x", "y"]
    chunks = choice_chunks(stream(TEXT, prompt=["ab", "cd"], n=2, echo=True))
    for index, prompt, reply in ((0, "ab", "x"), (1, "ab", "y"), (2, "cd", "x"), (3, "cd", "y")):
        texts = [text_of(c) for c in chunks if c["choices"][0]["index"] == index]
        assert texts[0] == prompt
        assert "".join(texts) == prompt + reply


def test_echo_without_tokens_streams_the_prompt(stream):
    first, last, done = stream(TEXT, prompt="ab", echo=True, max_tokens=0)
    assert (text_of(first), text_of(last), done) == ("ab", "", "[DONE]")
    assert last["choices"][0]["finish_reason"] == "length"


@both
@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 9}, {"max_tokens": 1000}, {"n": 100000000}, {"model": "nope"}],
    ids=lambda w: next(iter(w)),
)
def test_a_refused_request_is_plain_json_even_if_it_would_stream(client, path, wrong):
    response = client.post(path, json={**BODIES[path], "stream": True, **wrong})
    assert response.status_code in (400, 404)
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@both
def test_an_error_after_the_start_is_one_event_and_the_end(client, engine, path):
    engine.fail_after = 2
    response = client.post(path, json={"stream": True, **BODIES[path]})
    assert response.status_code == 200
    *before, last = response.text[:-2].split("\n\n")
    assert all('"error"' not in event for event in before)
    assert last == (
        'data: {"error":{"message":"the engine could not compute this request","type":"server_error",'
        '"param":null,"code":"request_failed"}}'
    )


def test_one_failing_prompt_aborts_the_others(engine, stream):
    engine.fail_after = 2
    stream(TEXT, prompt=["a", "b"])
    assert engine.num_running == 0
    assert len(engine.aborted) == 2  # the fake counts the failed one too


def test_text_is_sent_as_utf_8_on_one_line(client, engine):
    engine.replies = ["é\n\u2028\r\n"]
    response = client.post(TEXT, json={"stream": True, "prompt": "x"})
    assert '"é"' in response.text
    assert "\r" not in response.text
    assert all(event.count("\n") == 0 for event in response.text[:-2].split("\n\n"))


def test_silence_is_filled_with_comments():
    async def run() -> list[bytes]:
        release = asyncio.Event()
        sent: list[bytes] = []

        async def events():
            await release.wait()
            yield b"data: 1\n\n"

        async def send(message: Any) -> None:
            if message.get("body"):
                sent.append(message["body"])
                if len(sent) == 2:
                    release.set()

        async def receive() -> Any:
            await asyncio.Event().wait()

        await EventStream(drawn_from(events()), keep_alive=0.01)({"type": "http"}, receive, send)
        return sent

    sent = asyncio.run(run())
    assert sent[:2] == [b": ping\n\n", b": ping\n\n"]
    assert sent[-1] == b"data: 1\n\n"


def test_what_was_written_before_a_stream_is_cut_off_is_sent_before_the_error():
    async def run() -> list[bytes]:
        sent: list[bytes] = []
        exchange = Exchange("x", asyncio.current_task())
        exchange.begin()

        async def produce(outlet: Outlet) -> None:
            outlet.write(b"data: 1\n\n")
            await asyncio.sleep(0)
            outlet.write(b"data: 2\n\n")
            exchange.end(ApiError(503, "the server stopped"))
            await outlet.drained()

        async def send(message: Any) -> None:
            await asyncio.sleep(0.01)
            if message.get("body"):
                sent.append(message["body"])

        with pytest.raises(asyncio.CancelledError):
            await EventStream(produce, keep_alive=10)({"type": "http"}, lambda: asyncio.Event().wait(), send)
        return sent

    *before, error = asyncio.run(run())
    assert before == [b"data: 1\n\n", b"data: 2\n\n"]
    assert b"the server stopped" in error


def test_json_refuses_what_is_no_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"logprob": float("nan")})


@pytest.mark.parametrize("text", ["", 'a "quoted"\\ \n\t\x00\x1f\x7f', "na\u00efve \u2028 \U0001f600 \ufffd"])
def test_chunk_writer_writes_the_same_text_with_and_without_logprobs(text):
    writer = ChunkWriter({"id": "x"}, None, dict)
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    for logprobs in (None, {}):
        (read,) = json.loads(writer.chunk(choice | {"logprobs": logprobs}).removeprefix(b"data: "))["choices"]
        assert read == choice | {"logprobs": logprobs}
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.chunk(choice | {"logprobs": {"token_logprobs": [float("nan")]}})


def test_chunk_writer_writes_the_head_once_encoded():
    writer = ChunkWriter({"id": "x"}, None, dict)
    assert writer.chunk({"index": 0}) == b'data: {"id":"x","choices":[{"index":0}]}\n\n'
    assert writer.end() == b"data: [DONE]\n\n"
