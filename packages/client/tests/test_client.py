from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest

from octavo_client import AsyncOctavo, ConfigurationError, EmbeddingExtras, Extras, Octavo
from octavo_client.wire_server import Health

if TYPE_CHECKING:
    from conftest import Caller

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
EXTRAS = Extras(top_k=40, stop_token_ids=[2], cache_salt="é")
SENT = {"top_k": 40, "stop_token_ids": [2], "cache_salt": "é"}


def test_extras_land_at_the_top_level_of_the_body_and_unset_ones_do_not(caller: Caller) -> None:
    reply = caller.run(caller.client().chat.completions.create(**CHAT, temperature=0, extra_body=EXTRAS))
    assert reply.choices[0].message.content == "Paris."
    assert caller.body == {**CHAT, "temperature": 0, **SENT}
    assert caller.url == "http://localhost:8000/v1/chat/completions"


def test_extras_go_with_text_completions(caller: Caller) -> None:
    caller.run(caller.client().completions.create(model="m", prompt="The", extra_body=EXTRAS))
    assert caller.body == {"model": "m", "prompt": "The", **SENT}


def test_pooling_goes_with_embeddings(caller: Caller) -> None:
    extras = EmbeddingExtras(pooling="mean")
    reply = caller.run(
        caller.client().embeddings.create(model="m", input="a", encoding_format="float", extra_body=extras)
    )
    assert reply.data[0].embedding == [0.6, 0.8]
    assert caller.body == {"model": "m", "input": "a", "encoding_format": "float", "pooling": "mean"}


def test_extras_go_with_a_stream(caller: Caller) -> None:
    chunks = caller.collect(caller.client().chat.completions.create(**CHAT, stream=True, extra_body=EXTRAS))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Paris."
    assert caller.body == {**CHAT, "stream": True, **SENT}


def test_extras_go_with_the_stream_helper(caller: Caller) -> None:
    manager = caller.client().chat.completions.stream(**CHAT, extra_body=EXTRAS)
    final = caller.enter(manager, lambda stream: stream.get_final_completion())
    assert final.choices[0].message.content == "Paris."
    assert caller.body == {**CHAT, "stream": True, **SENT}


def test_extras_go_with_parse(caller: Caller) -> None:
    caller.run(caller.client().chat.completions.parse(**CHAT, extra_body=EXTRAS))
    assert caller.body == {**CHAT, "stream": False, **SENT}


def test_extras_go_with_a_raw_response(caller: Caller) -> None:
    raw = caller.run(caller.client().chat.completions.with_raw_response.create(**CHAT, extra_body=EXTRAS))
    assert raw.status_code == 200
    assert raw.parse().choices[0].message.content == "Paris."
    assert caller.body == {**CHAT, **SENT}


def test_extras_go_with_a_streaming_response(caller: Caller) -> None:
    manager = caller.client().with_streaming_response.chat.completions.create(**CHAT, extra_body=EXTRAS)
    reply = caller.enter(manager, lambda response: response.parse())
    assert reply.choices[0].message.content == "Paris."
    assert caller.body == {**CHAT, **SENT}


def test_extras_go_with_a_request_of_ones_own(caller: Caller) -> None:
    caller.answer = lambda request: httpx2.Response(200, json={})
    caller.run(caller.client().post("/anything", cast_to=object, options={"extra_json": EXTRAS}))
    assert caller.body == SENT


def test_extras_survive_a_retry(caller: Caller) -> None:
    def fail_once(request: httpx2.Request) -> httpx2.Response:
        if len(caller.requests) == 1:
            return httpx2.Response(503, json={}, headers={"retry-after-ms": "1"})
        return usual(request)

    usual, caller.answer = caller.answer, fail_once
    caller.run(caller.client().chat.completions.create(**CHAT, extra_body=EXTRAS))
    assert [json.loads(request.content) for request in caller.requests] == [{**CHAT, **SENT}] * 2


def test_a_plain_dict_is_still_an_extra_body(caller: Caller) -> None:
    caller.run(caller.client().chat.completions.create(**CHAT, extra_body={"anything": 1}))
    assert caller.body == {**CHAT, "anything": 1}


def test_extras_work_with_the_plain_openai_client(caller: Caller) -> None:
    caller.run(caller.plain_client().chat.completions.create(**CHAT, extra_body=EXTRAS))
    assert caller.body == {**CHAT, **SENT}


@pytest.mark.parametrize("method", ["copy", "with_options"])
def test_copies_keep_kind_options_and_resources(caller: Caller, method: str) -> None:
    first = caller.client(
        api_key="key", base_url="http://test/v1", max_retries=7, default_headers={"x-team": "a"}, default_query={"q": 1}
    )
    second = getattr(first, method)(timeout=3.0)
    assert type(second) is type(first)
    assert (second.api_key, second.max_retries, second.timeout) == ("key", 7, 3.0)
    assert second.tokens is not first.tokens
    assert caller.run(second.server.health()) == Health()
    assert caller.url == "http://test/health?q=1"
    assert caller.requests[-1].headers["x-team"] == "a"
    assert caller.requests[-1].headers["authorization"] == "Bearer key"


def test_copy_can_replace_every_option(caller: Caller) -> None:
    first = caller.client(api_key="key", default_headers={"x-team": "a"})
    second = first.copy(api_key="other", base_url="http://else/v1", max_retries=0, set_default_headers={"x-b": "b"})
    caller.run(second.models.list() if caller.kind == "sync" else second.server.health())
    headers = caller.requests[-1].headers
    assert caller.url.startswith("http://else/")
    assert (headers["authorization"], headers["x-b"], "x-team" in headers) == ("Bearer other", "b", False)
    assert first.api_key == "key"


def test_copy_of_a_client_without_a_key_does_not_pick_one_up(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    first = caller.client()
    monkeypatch.setenv("OCTAVO_API_KEY", "later")
    caller.run(first.with_options(timeout=1).server.health())
    assert "authorization" not in caller.requests[-1].headers


def test_key_and_address_come_from_the_octavo_variables(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "from env")
    monkeypatch.setenv("OCTAVO_BASE_URL", "https://example.test/v1")
    caller.run(caller.client().chat.completions.create(**CHAT))
    assert caller.url == "https://example.test/v1/chat/completions"
    assert caller.requests[-1].headers["authorization"] == "Bearer from env"


def test_arguments_go_before_the_octavo_variables(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "from env")
    monkeypatch.setenv("OCTAVO_BASE_URL", "https://example.test/v1")
    caller.run(caller.client(api_key="given", base_url="http://given/v1").chat.completions.create(**CHAT))
    assert caller.url == "http://given/v1/chat/completions"
    assert caller.requests[-1].headers["authorization"] == "Bearer given"


def test_without_a_key_no_authorization_header_is_sent(caller: Caller) -> None:
    caller.run(caller.client().chat.completions.create(**CHAT))
    assert "authorization" not in caller.requests[-1].headers


def test_a_function_may_give_the_key_of_each_request(caller: Caller) -> None:
    keys = iter(["one", "two"])

    async def next_key() -> str:
        return next(keys)

    client = caller.client(api_key=next_key if caller.kind == "async" else lambda: next(keys))
    for _ in range(2):
        caller.run(client.chat.completions.create(**CHAT))
    assert [request.headers["authorization"] for request in caller.requests] == ["Bearer one", "Bearer two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be an http or https address"),
        ({"base_url": ""}, "base_url must be an http or https address"),
        ({"base_url": "ftp://host/v1"}, "base_url must be an http or https address"),
        ({"base_url": "http://host:port/v1"}, "base_url is no address"),
        ({"base_url": "http://host/v1?a=1"}, "base_url takes no query"),
        ({"max_retries": -1}, "max_retries must be an integer of 0 or more, got -1"),
        ({"max_retries": None}, "max_retries must be an integer of 0 or more, got None"),
        ({"workload_identity": {}}, "workload_identity configures access to OpenAI"),
        ({"provider": object()}, "provider configures access to OpenAI"),
        ({"admin_api_key": "a"}, "admin_api_key configures access to OpenAI"),
    ],
)
def test_senseless_configuration_is_named(caller: Caller, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        caller.client(**options)


def test_senseless_variable_is_named_without_its_password(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_BASE_URL", "ftp://me:hush@host/v1")
    with pytest.raises(ConfigurationError, match="OCTAVO_BASE_URL must be") as caught:
        caller.client()
    assert "hush" not in str(caught.value)


def test_explicit_organization_is_sent(caller: Caller) -> None:
    caller.run(caller.client(organization="o", project="p").chat.completions.create(**CHAT))
    headers = caller.requests[-1].headers
    assert (headers["openai-organization"], headers["openai-project"]) == ("o", "p")


def openai_variables() -> list[str]:
    """Every variable that the SDK's source names with OpenAI's prefix, so that a new one is found."""
    root = Path(openai.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    return sorted(set(re.findall(r"[\"'`]((?:AZURE_)?OPENAI_[A-Z_]+)[\"'`]", text)))


def test_no_openai_variable_leaves_the_process(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = "sk-marker"
    names = openai_variables()
    assert {"OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"} <= set(names)
    assert {"OPENAI_BASE_URL", "OPENAI_CUSTOM_HEADERS", "OPENAI_WEBHOOK_SECRET"} <= set(names)
    for name in names:
        monkeypatch.setenv(name, f"https://{marker}.test/v1" if name.endswith(("URL", "ENDPOINT")) else marker)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"x-custom: {marker}\nAuthorization: Bearer {marker}")

    for key in (None, "octavo-key"):
        client = caller.client(api_key=key)
        for each in (client, client.copy(), client.with_options(timeout=1).with_options(max_retries=1)):
            caller.run(each.chat.completions.create(**CHAT, extra_body=EXTRAS))
            caller.collect(each.chat.completions.create(**CHAT, stream=True))
            caller.run(each.chat.completions.with_raw_response.create(**CHAT))
            caller.run(each.tokens.tokenize("a"))
            caller.run(each.server.version())
            assert (each.organization, each.project, each.webhook_secret, each.admin_api_key) == (None,) * 4

    assert len(caller.requests) == 30
    for request in caller.requests:
        sent = f"{request.url} {list(request.headers.multi_items())} {request.content!r}"
        assert marker not in sent
        assert request.url.host == "localhost"
        assert "openai-organization" not in request.headers
    assert {request.headers.get("authorization") for request in caller.requests} == {None, "Bearer octavo-key"}


def test_the_plain_openai_client_would_send_the_marker(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-custom: sk-marker")
    caller.run(caller.plain_client().chat.completions.create(**CHAT))
    assert caller.requests[-1].headers["x-custom"] == "sk-marker"


def test_no_more_variables_are_looked_at_than_must_be() -> None:
    # The SDK always looks at OPENAI_CUSTOM_HEADERS; what it takes from there is dropped.
    program = """
import os
read = []
class Watched(type(os.environ)):
    def get(self, name, default=None):
        read.append(name)
        return super().get(name, default)
from octavo_client import AsyncOctavo, Octavo
os.environ.__class__ = Watched
clients = [Octavo(), AsyncOctavo()]
print(sorted({name for name in read if "OCTAVO" in name or "OPENAI" in name}))
print([(c.api_key, str(c.base_url), dict(c._custom_headers)) for c in clients])
"""
    environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": "http://x", "OPENAI_CUSTOM_HEADERS": "a: x"}
    environment.pop("OCTAVO_API_KEY", None)
    environment.pop("OCTAVO_BASE_URL", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [
        "['OCTAVO_API_KEY', 'OCTAVO_BASE_URL', 'OPENAI_CUSTOM_HEADERS']",
        "[('', 'http://localhost:8000/v1/', {}), ('', 'http://localhost:8000/v1/', {})]",
    ]


def test_clients_are_the_sdks_with_unchanged_methods() -> None:
    assert issubclass(Octavo, openai.OpenAI)
    assert issubclass(AsyncOctavo, openai.AsyncOpenAI)
    assert Octavo.copy is openai.OpenAI.copy
    assert AsyncOctavo.copy is openai.AsyncOpenAI.copy
    for name in ("chat", "completions", "embeddings", "models", "with_options"):
        assert getattr(Octavo, name) is getattr(openai.OpenAI, name)
        assert getattr(AsyncOctavo, name) is getattr(openai.AsyncOpenAI, name)
