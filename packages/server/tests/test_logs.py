"""Logs: the one line of each request, and how records are written."""

import json
import logging

import pytest

from octavo_engine.errors import InvalidConfig
from octavo_server.keys import ApiKey
from octavo_server.logs import REQUESTS, JsonFormatter, TextFormatter, set_up_logging

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "a secret"}


@pytest.fixture
def lines(caplog):
    """The lines of requests so far, as JSON."""
    caplog.set_level(logging.DEBUG, REQUESTS)
    formatter = JsonFormatter()

    def read():
        return [json.loads(formatter.format(record)) for record in caplog.records if record.name == REQUESTS]

    return read


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_without_its_prompt(make_client, engine, lines, stream, caplog):
    engine.num_cached_tokens = 3
    client = make_client(engine, named_keys=(ApiKey.of("alice", "k"),))
    body = {"messages": [USER], "stream": stream}
    headers = {"x-api-key": "k", "x-request-id": "r1"}
    assert client.post(CHAT, json=body, headers=headers).status_code == 200
    (line,) = lines()
    assert line.pop("duration") >= line.pop("time_to_first_token") >= 0
    assert len(line.pop("time")) == len("2026-01-01T00:00:00.000")
    assert line == {
        "level": "info",
        "logger": REQUESTS,
        "message": f"POST {CHAT} 200",
        "method": "POST",
        "route": CHAT,
        "status": 200,
        "key": "alice",
        "prompt_tokens": 26,
        "cached_tokens": 3,
        "generated_tokens": 8,
        "queue_time": 0.25,
        "finish_reason": "stop",
    }
    assert "secret" not in caplog.text


def test_the_line_and_all_others_of_a_request_have_its_id(make_client, engine, caplog):
    engine.broken = ZeroDivisionError("oh")
    formatted = []
    handler = logging.Handler()
    handler.emit = lambda record: formatted.append(json.loads(JsonFormatter().format(record)))
    logging.getLogger("octavo_server").addHandler(handler)
    try:
        make_client(engine).post(TEXT, json={"prompt": "a"}, headers={"x-request-id": "r7"})
    finally:
        logging.getLogger("octavo_server").removeHandler(handler)
    assert {line["request_id"] for line in formatted} == {"r7"}
    assert any("ZeroDivisionError: oh" in line.get("exception", "") for line in formatted)


def test_prompts_are_logged_if_asked_for(make_client, engine, lines):
    client = make_client(engine, log_prompts=True)
    client.post(TEXT, json={"prompt": ["one", "two"], "max_tokens": 2})
    (line,) = lines()
    assert line["prompts"] == ["one", "two"]
    assert (line["prompt_tokens"], line["generated_tokens"], line["finish_reason"]) == (6, 4, "length")


@pytest.mark.parametrize(
    ("path", "status", "level"), [("/nothing/secret", 404, "info"), ("/health", 200, "debug"), (TEXT, 405, "info")]
)
def test_what_the_engine_never_saw_has_a_line_too(client, lines, path, status, level):
    client.get(path)
    (line,) = lines()
    assert (line["status"], line["level"]) == (status, level)
    assert "prompt_tokens" not in line
    assert "secret" not in json.dumps(line)


def test_a_request_that_is_cut_off_says_why(make_client, engine, lines):
    engine.hold_after = 0
    make_client(engine).post(TEXT, json={"prompt": "a", "stream": True, "timeout": 0.05})
    (line,) = lines()
    assert (line["ended_by"], line["generated_tokens"], line["finish_reason"]) == ("timeout", 0, None)


def test_text_has_the_fields_at_the_end():
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "did %s", ("it",), None)
    record.octavo_fields = {"key": "a b", "queue_time": 0.5, "finish_reason": None}
    assert TextFormatter().format(record).endswith(' WARNING x: did it key="a b" queue_time=0.5')


def test_a_line_of_json_stays_one_line():
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "a\nb\u2028", (), None)
    assert "\n" not in JsonFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["message"] == "a\nb\u2028"


@pytest.mark.parametrize(
    ("level", "log_format", "what"), [("loud", "text", "log_level"), ("info", "xml", "log_format")]
)
def test_an_unknown_level_or_format_is_refused(level, log_format, what):
    with pytest.raises(InvalidConfig, match=what):
        set_up_logging(level, log_format)
