"""What survives the end of a server, kill -9 and SIGTERM: a process of its own serves the fake engine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from octavo_server.store.store import Store

FAKE_SERVER = Path(__file__).with_name("fake_server.py")
MODEL = "org/fake-model"
CHAT = "/v1/chat/completions"


@contextmanager
def server(folder, hold_after=None):
    """Serve from a folder; yield a client and the process."""
    command = [sys.executable, str(FAKE_SERVER), "serve", "--port", "0", "--state-dir", str(folder)]
    hold = {} if hold_after is None else {"HOLD_AFTER": str(hold_after)}
    environment = os.environ | {"COLUMNS": "300", "OCTAVO_API_KEY": ""} | hold
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(match[0] for line in process.stderr if (match := re.search(r"http://\S+", line)))
            with openai.OpenAI(base_url=url, api_key="none", max_retries=5) as client:
                yield client, process
        finally:
            process.kill()


def until(condition):
    deadline = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen within ten seconds"
    return value


def request_line(custom_id, **body):
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})


def make_batch(client, *lines):
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_what_was_begun_survives_kill_9_and_sigterm(tmp_path):
    with server(tmp_path, hold_after=5) as (client, process):
        done = client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
        batch = make_batch(client, *(request_line(f"{i}", **({"max_tokens": 3} if i < 5 else {})) for i in range(9)))
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 5)
        told = client.responses.create(model=MODEL, input="hi", stream=True)
        foreground = next(told).response.id
        again = client.responses.create(model=MODEL, input="hi", background=True)
        followed = client.responses.create(model=MODEL, input="hi", background=True, stream=True)
        streamed = next(followed).response.id
        seen = [next(followed).sequence_number for _ in range(6)]
        process.send_signal(signal.SIGKILL)
        process.wait()

    with server(tmp_path) as (client, process):
        assert client.responses.retrieve(done.id) == done
        for response_id in (foreground, streamed):
            failed = client.responses.retrieve(response_id)
            assert (failed.status, failed.error.code) == ("failed", "server_error")
            assert "the server stopped" in failed.error.message
        rest = list(client.responses.retrieve(streamed, stream=True, starting_after=seen[-1]))
        assert rest[-1].type == "response.failed"
        assert [event.sequence_number for event in rest] == [seen[-1] + 1 + place for place in range(len(rest))]
        until(lambda: client.responses.retrieve(again.id).status == "completed")
        batch = until(lambda: (now := client.batches.retrieve(batch.id)).status == "completed" and now)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (9, 0)
        lines = client.files.content(batch.output_file_id).text.splitlines()
        assert sorted(json.loads(line)["custom_id"] for line in lines) == [f"{i}" for i in range(9)]
        assert client.files.content(batch.input_file_id).text.count("\n") == 8
        metrics = client.get(str(client.base_url).replace("/v1/", "/metrics"), cast_to=str)
        computed = re.findall(r"^octavo_request_success_total\{.*?\} (\d+)", metrics, re.MULTILINE)
        assert sum(map(int, computed)) == 4 + 1  # the lines that were not done, and the response that is made again
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0

    with Store(tmp_path) as store:
        assert store.files.path(batch.output_file_id).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_no_line_is_lost_or_done_twice_however_often_the_server_is_stopped(tmp_path, number):
    num_lines, batch_id, num_starts = 2000, None, 0
    while True:
        num_starts += 1
        with server(tmp_path) as (client, process):
            if batch_id is None:
                batch_id = make_batch(client, *(request_line(f"{i}") for i in range(num_lines))).id
            time.sleep(0.5)
            batch = client.batches.retrieve(batch_id)
            if batch.status == "completed":
                lines = client.files.content(batch.output_file_id).text.splitlines()
                break
            process.send_signal(number)
            process.wait()
    assert num_starts > 2, num_starts
    assert sorted(int(json.loads(line)["custom_id"]) for line in lines) == list(range(num_lines))
    assert batch.request_counts.completed == num_lines
