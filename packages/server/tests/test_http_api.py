"""docs/http-api.md: every example runs, and every route has one."""

import re
import shlex
import time
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from octavo_engine.timeline import RequestTimeline
from octavo_engine.types import CachedTokens
from octavo_server import ServerSettings, create_app

PAGE = Path(__file__).parents[3] / "docs/http-api.md"
NAMES = {  # the route whose answer has the id
    ("POST", "/v1/completions"): "REQUEST_ID",
    ("POST", "/v1/responses"): "RESPONSE_ID",
    ("POST", "/v1/files"): "FILE_ID",
    ("POST", "/v1/batches"): "BATCH_ID",
    ("POST", "/v1/cache/pins"): "PIN_ID",
}

if not PAGE.exists():
    pytest.skip("the documentation is not here", allow_module_level=True)


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


class Curl:
    """Runs curl's commands on an app, and remembers the ids in answers."""

    def __init__(self, client, line):
        self.client = client
        self.names = {"BASE": "", "MODEL": "org/fake-model"}
        self.line = line

    def run(self, command):
        program, *words = shlex.split(Template(command).substitute(self.names))
        assert program == "curl"
        method, path, content, headers, form = None, None, None, {}, {}
        while words:
            word = words.pop(0)
            if word == "-X":
                method = words.pop(0)
            elif word == "-H":
                name, _, value = words.pop(0).partition(": ")
                headers[name] = value
            elif word == "-d":
                content = words.pop(0)
            elif word == "-F":
                name, _, value = words.pop(0).partition("=")
                form[name] = value
            else:
                assert path is None, word
                path = word
        method = method or ("GET" if content is None and not form else "POST")
        if form:
            files = {"file": (form.pop("file").removeprefix("@"), self.line)}
            response = self.client.post(path, data=form, files=files)
        else:
            if method == "DELETE" and "/v1/files/" in path:
                self.wait_for_batch()
            response = self.client.request(method, path, content=content, headers=headers)
        route = method, urlsplit(path).path
        if (name := NAMES.get(route)) is not None:
            self.names[name] = response.json()["id"]
        return route, response

    def wait_for_batch(self):
        """Return when the batch that was cancelled reads its file no more."""
        deadline = time.monotonic() + 20
        while self.client.get(f"/v1/batches/{self.names['BATCH_ID']}").json()["status"] == "cancelling":
            assert time.monotonic() < deadline, "the batch was cancelled and does not end"
            time.sleep(0.01)


@pytest.fixture
def curl(engine, monkeypatch, tmp_path):
    async def release(request_id):
        return True

    async def timeline(request_id):
        return RequestTimeline(
            request_id=request_id,
            state="finished",
            arrival=0.0,
            grammar_seconds=0.0,
            num_prompt_tokens=1,
            cached=CachedTokens(),
            num_waiting_before=0,
            waits=(),
            chunks=(),
            preemptions=(),
            choices=(),
        )

    monkeypatch.setattr(engine, "release", release)
    monkeypatch.setattr(engine, "timeline", timeline)
    (line,) = re.findall(r'^`(\{"custom_id".*\})`', PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    with TestClient(create_app(engine, ServerSettings(local_only=True, lora_dir=tmp_path))) as client:
        yield Curl(client, line)


def test_every_example_runs_and_every_route_has_one(curl):
    shown = set()
    for command in commands():
        (method, path), response = curl.run(command)
        assert response.status_code == 200, f"{command}\n{response.text}"
        shown.add((method, path))
    templates = curl.client.get("/openapi.json").json()["paths"]
    missing = [
        (method.upper(), template)
        for template, methods in templates.items()
        for method in methods
        if not any(own == method.upper() and _fits(template, path) for own, path in shown)
    ]
    assert missing == []


def _fits(template, path):
    pattern = re.sub(r"\{\w+\}", "[^/]+" if "model" not in template else ".+", template)
    return re.fullmatch(pattern, path) is not None
