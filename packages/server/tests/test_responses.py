"""Responses: OpenAI's shapes, whole and streamed; conversations, tools, the background, and what is refused."""

import asyncio
import importlib.util
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

from octavo_engine.text.answer_format import AnswerFormat
from octavo_engine.text.chat_template import ChatTemplate

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "get_weather", "description": "Tells the weather.", "parameters": CITY}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
grammars = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs octavo-engine[structured]")


def ask(client: Any, given: Any = "hi", **body: Any) -> Any:
    response = client.post(RESPONSES, json={"input": given, **body})
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    return response.json()


def refusal(client: Any, **body: Any) -> Any:
    response = client.post(RESPONSES, json={"input": "hi", **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
    return events


def stream(client: Any, given: Any = "hi", **body: Any) -> list[dict[str, Any]]:
    response = client.post(RESPONSES, json={"input": given, "stream": True, **body})
    assert response.status_code == 200, response.text
    events = events_of(response.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def prompt_of(engine: Any) -> str:
    return bytes(engine.requests[-1].prompt_token_ids).decode()


def plain(output: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return an output's items as their types and texts."""
    return [(i["type"], i.get("arguments") or i["content"][0]["text"]) for i in output]


@pytest.fixture
def hermes(client, engine):
    """Let the engine's model write Hermes's calls, and think."""
    engine.text.answers = AnswerFormat.of("<tool_call><think>")
    engine.text.max_model_len = 2000
    return client


def test_a_response_has_openais_shape_and_is_stored(client):
    answer = ask(client, temperature=0.5, metadata={"a": "b"}, user="u", instructions="be brief")
    expected = {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": "be brief",
        "model": "org/fake-model",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "top_p": 1.0,
        "text": {"format": {"type": "text"}},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "truncation": "disabled",
        "store": True,
        "background": False,
        "user": "u",
    }
    assert {name: answer[name] for name in expected} == expected
    assert answer["usage"] == {
        "input_tokens": len("<system>be brief\n<user>hi\n<assistant>"),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len("<system>be brief\n<user>hi\n<assistant>") + 8,
    }
    (message,) = answer["output"]
    assert message == {
        "id": message["id"],
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": " Paris.", "annotations": [], "logprobs": []}],
    }
    assert client.get(f"{RESPONSES}/{answer['id']}").json() == answer


def test_a_stream_has_openais_events_and_ends_in_the_same_response(client):
    events = stream(client)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[4:-4] == ["output_text.delta"] * 7
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    final = events[-1]["response"]
    assert "".join(event["delta"] for event in events[4:-4]) == final["output"][0]["content"][0]["text"] == " Paris."
    assert client.get(f"{RESPONSES}/{final['id']}").json() == final


@pytest.mark.parametrize("step", [1, 100], ids=["a token at a time", "at once"])
def test_reasoning_text_and_calls_are_items(hermes, engine, step):
    engine.replies, engine.step = [f"<think>hm</think>I look. {CALL}{CALL}"], step
    expected = [("reasoning", "hm"), ("message", "I look."), *[("function_call", '{"city": "Paris"}')] * 2]
    answer = ask(hermes, tools=[TOOL], max_output_tokens=500)
    assert plain(answer["output"]) == expected
    assert {i["status"] for i in answer["output"]} == {"completed"}
    assert answer["tools"] == [TOOL | {"strict": False}]
    if step == 1:
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == pytest.approx(len("<think>hm"), abs=9)
    events = stream(hermes, tools=[TOOL], max_output_tokens=500)
    assert plain(events[-1]["response"]["output"]) == expected
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    joined: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            joined[event["output_index"]] = joined.get(event["output_index"], "") + event["delta"]
    assert list(joined.values()) == [text for _, text in expected]


@grammars
def test_the_format_and_the_choice_among_tools_are_the_chats(hermes, engine):
    engine.replies = ['{"city": "Rome"}']
    schema = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    ask(hermes, text={"format": schema})
    assert json.loads(engine.requests[-1].sampling.structured_outputs.json) == CITY
    ask(hermes, text={"format": {"type": "json_object"}})
    assert engine.requests[-1].sampling.structured_outputs.json_object
    answer = ask(hermes, tools=[TOOL], tool_choice={"type": "function", "name": "get_weather"})
    assert plain(answer["output"]) == [("function_call", '{"city": "Rome"}')]
    other = TOOL | {"name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    ask(hermes, tools=[TOOL, other], tool_choice=allowed, parallel_tool_calls=False)
    demanded = json.loads(engine.requests[-1].sampling.structured_outputs.json)
    assert demanded["maxItems"] == 1
    assert [call["properties"]["name"]["const"] for call in demanded["items"]["anyOf"]] == ["other"]


def test_every_form_of_input_is_laid_out(client, engine):
    given = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "42"},
        {"role": "user", "content": "so?"},
    ]
    answer = ask(client, given, max_output_tokens=5)
    assert prompt_of(engine).startswith("<system>be brief\n<user>a\n<assistant>I look.")
    assert prompt_of(engine).endswith("\n<tool>42\n<user>so?\n<assistant>")
    assert '{"name": "f", "arguments": {"x": 1}}' in prompt_of(engine)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    listed = client.get(f"{RESPONSES}/{answer['id']}/input_items", params={"order": "asc"}).json()
    ResponseItemList.model_validate(listed)
    assert [i["type"] for i in listed["data"]] == ["message"] * 2 + ["reasoning", "message"] + [
        "function_call",
        "function_call_output",
        "message",
    ]


def test_a_response_goes_on_from_another_but_not_from_its_instructions(client, engine):
    first = ask(client, instructions="be brief")
    second = ask(client, "and Italy?", previous_response_id=first["id"])
    assert prompt_of(engine) == "<user>hi\n<assistant> Paris.\n<user>and Italy?\n<assistant>"
    ask(client, [{"type": "item_reference", "id": first["output"][0]["id"]}, {"role": "user", "content": "x"}])
    assert prompt_of(engine) == "<assistant> Paris.\n<user>x\n<assistant>"
    items = f"{RESPONSES}/{second['id']}/input_items"
    page = client.get(items, params={"limit": 2}).json()
    assert [i["content"][0]["text"] for i in page["data"]] == ["and Italy?", " Paris."]
    assert page["has_more"]
    rest = client.get(items, params={"limit": 2, "after": page["last_id"]}).json()
    assert ([i["content"][0]["text"] for i in rest["data"]], rest["has_more"]) == (["hi"], False)
    assert client.delete(f"{RESPONSES}/{first['id']}").json() == {
        "id": first["id"],
        "object": "response",
        "deleted": True,
    }
    error = refusal(client, previous_response_id=second["id"])
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


def test_what_is_not_to_be_stored_is_not(client):
    answer = ask(client, store=False)
    for method, path in [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")]:
        response = client.request(method, f"{RESPONSES}/{answer['id']}{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")


def test_responses_belong_to_their_key(make_client, engine):
    client = make_client(engine, api_keys=("one", "two"))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    answer = client.post(RESPONSES, json={"input": "hi"}, headers=one).json()
    assert client.get(f"{RESPONSES}/{answer['id']}", headers=one).json() == answer
    assert client.get(f"{RESPONSES}/{answer['id']}", headers=two).status_code == 404
    body = {"input": "hi", "previous_response_id": answer["id"]}
    assert client.post(RESPONSES, json=body, headers=two).status_code == 400


def test_truncation_leaves_out_the_oldest_turns(client, engine):
    turns = [{"role": "user" if place % 2 == 0 else "assistant", "content": f"{place}" * 30} for place in range(9)]
    assert refusal(client, input=turns)["code"] == "context_length_exceeded"
    answer = ask(client, turns, truncation="auto", instructions="be brief", max_output_tokens=10)
    assert answer["truncation"] == "auto"
    assert prompt_of(engine).startswith("<system>be brief\n<user>666")
    assert refusal(client, input="x" * 300, truncation="auto")["param"] == "input"


def test_the_effort_of_reasoning_reaches_the_template(client, engine):
    engine.text._chat_template = ChatTemplate("{{ reasoning_effort }},{{ enable_thinking }}", {})
    assert ask(client, reasoning={"effort": "high"})["reasoning"] == {"effort": "high", "summary": None}
    assert prompt_of(engine) == "high,"
    ask(client, reasoning={"effort": "none"})
    assert prompt_of(engine) == ",False"
    ask(client, reasoning={"effort": "low"}, chat_template_kwargs={"reasoning_effort": "max"})
    assert prompt_of(engine) == "max,"


def test_logprobs_are_shown_if_included(client):
    answer = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == " Paris."
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 7
    events = stream(client, include=["message.output_text.logprobs"])
    assert all(len(event["logprobs"]) == 1 for event in events if event["type"] == "response.output_text.delta")


REFUSED = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0]",
    ),
    "another role": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    "another item": ({"input": [{"type": "web_search_call"}]}, "input[0]"),
    "an unknown item": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    "a built-in tool": ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    "an unknown choice": ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice"),
    "allowed tools that are none": (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": 5}},
        "tool_choice",
    ),
    "an effort that is none": ({"reasoning": {"effort": ["high"]}}, "reasoning.effort"),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "an unknown format": ({"text": {"format": {"type": "sound"}}}, "text.format"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "too warm": ({"temperature": 3}, "temperature"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "an unknown previous": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "background unstored": ({"background": True, "store": False}, "store"),
    "long metadata": ({"metadata": {"a": "b" * 513}}, "metadata.a"),
    "metadata of numbers": ({"metadata": {"a": 1}}, "metadata.a"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "too long": ({"input": "x" * 300}, "input"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "beams and heat": ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
    "token ids": ({"return_token_ids": True}, "return_token_ids"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_is_one_error_that_names_the_field(client, engine, body, param):
    error = refusal(client, **body)
    assert error["param"] == param, error
    assert engine.requests == []


def test_a_failure_is_told(client, engine):
    engine.fail_after = 2
    response = client.post(RESPONSES, json={"input": "hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "request_failed")
    events = stream(client)
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert "secret" not in json.dumps(failed)
    assert client.get(f"{RESPONSES}/{failed['id']}").json() == failed


def test_tokens_are_counted(client):
    response = client.post(f"{RESPONSES}/input_tokens", json={"input": "hi"})
    assert response.json() == {"object": "response.input_tokens", "input_tokens": len("<user>hi\n<assistant>")}


def wait_for(client, response_id, *statuses):
    for _ in range(500):
        answer = client.get(f"{RESPONSES}/{response_id}").json()
        if answer["status"] in statuses:
            return answer
    raise AssertionError(answer["status"])


def test_a_background_response_is_polled(client):
    queued = ask(client, background=True)
    assert (queued["status"], queued["output"]) == ("queued", [])
    done = wait_for(client, queued["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == " Paris."
    assert client.post(f"{RESPONSES}/{queued['id']}/cancel").json() == done
    assert "background and stream" in client.get(f"{RESPONSES}/{queued['id']}?stream=true").json()["error"]["message"]


def test_a_background_stream_is_taken_up_at_any_event(client):
    events = stream(client, background=True)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response_id = events[0]["response"]["id"]
    for after in (-1, 0, 5, len(events) - 1):
        text = client.get(f"{RESPONSES}/{response_id}", params={"stream": "true", "starting_after": after}).text
        assert (events_of(text) if text else []) == events[after + 1 :]
    wrong = client.get(f"{RESPONSES}/{response_id}", params={"stream": "true", "starting_after": "x"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "starting_after")


def test_followers_see_the_last_event_however_slow_the_disk_is(client, monkeypatch):
    store = client.app.state.durable.store.responses
    add_events = store.add_events

    async def add_later(response_id, events):
        await asyncio.sleep(0.02)
        await add_events(response_id, events)

    monkeypatch.setattr(store, "add_events", add_later)
    events = stream(client, background=True)
    assert events[-1]["type"] == "response.completed"


def test_a_background_response_is_cancelled(client, engine):
    engine.hold_after = 3
    queued = ask(client, background=True)
    assert engine.holding.wait(5)
    assert refusal(client, previous_response_id=queued["id"])["code"] == "previous_response_not_ended"
    cancelled = client.post(f"{RESPONSES}/{queued['id']}/cancel").json()
    assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
    assert (engine.aborted, engine.num_running) == ([queued["id"]], 0)
    assert client.post(f"{RESPONSES}/{queued['id']}/cancel").json() == cancelled
    engine.hold_after = None
    error = client.post(f"{RESPONSES}/{ask(client)['id']}/cancel").json()["error"]
    assert "background" in error["message"]


def test_those_beyond_the_slots_wait_and_can_be_cancelled_and_deleted(make_client, engine):
    client = make_client(engine, max_num_background=1)
    engine.hold_after = 3
    first, second, third = (ask(client, background=True)["id"] for _ in range(3))
    assert engine.holding.wait(5)
    assert client.get(f"{RESPONSES}/{second}").json()["status"] == "queued"
    assert client.post(f"{RESPONSES}/{second}/cancel").json()["status"] == "cancelled"
    assert len(engine.requests) == 1
    engine.hold_after = None
    assert client.delete(f"{RESPONSES}/{first}").status_code == 200
    wait_for(client, third, "completed")
    assert client.get(f"{RESPONSES}/{first}").status_code == 404


def test_the_sdk_reads_it_all(engine, serve):
    client = openai.OpenAI(base_url=serve(engine) + "/v1", api_key="none", max_retries=0)
    with client:
        with client.responses.stream(model="org/fake-model", input="hi") as told:
            assert "".join(e.delta for e in told if e.type == "response.output_text.delta") == " Paris."
            assert told.get_final_response().output_text == " Paris."
        answer = client.responses.create(model="org/fake-model", input="hi")
        assert client.responses.retrieve(answer.id) == answer
        assert [i.type for i in client.responses.input_items.list(answer.id)] == ["message"]
        assert client.responses.input_tokens.count(model="org/fake-model", input="hi").input_tokens == 20
        events = list(client.responses.create(model="org/fake-model", input="hi", background=True, stream=True))
        response_id = events[0].response.id
        again = list(client.responses.retrieve(response_id, stream=True, starting_after=3))
        assert again == events[4:]
        client.responses.delete(response_id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response_id)


def test_a_client_who_leaves_has_cancelled_a_response_that_waited_for_it(engine, serve, wait_until):
    client = openai.OpenAI(base_url=serve(engine) + "/v1", api_key="none", max_retries=0)
    engine.hold_after = 3
    with client:
        told = client.responses.create(model="org/fake-model", input="hi", stream=True)
        response_id = next(told).response.id
        assert client.responses.retrieve(response_id).status == "in_progress"
        told.close()
        wait_until(lambda: client.responses.retrieve(response_id).status == "cancelled")
        assert engine.num_running == 0
