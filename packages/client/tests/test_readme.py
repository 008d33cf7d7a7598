from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest

from octavo_client.wire import Extras

if TYPE_CHECKING:
    from conftest import Caller

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PRINTED = {
    "Chat": "Paris.\n",
    "Stream": "Paris.",
    "Several at once": " Paris.\n Paris.\n",
    "Rerank and score": "1 0.5 cosine_similarity\n[0.5]\n",
    "Adapters": "16\n",
    "Sleep and other weights": "600\n1\n",
    "Tokens, health, version": "2 [504, 3575]\nThe capital\nNone\nok 0.1.0\n",
    "Responses and batches": "Paris.\nFrance True\nItaly True\n",
    "Prefix cache": "32\n['pin-1']\n",
}


def test_every_example_is_known() -> None:
    assert [title for title, _ in EXAMPLES] == list(PRINTED)
    assert README.count("```python") == len(PRINTED)


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs_and_prints(
    caller: Caller, title: str, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def handle(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        request.read()
        return caller.answer(request)

    async def handle_async(transport: httpx2.AsyncHTTPTransport, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        return caller.answer(request)

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", handle)
    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", handle_async)
    exec(compile(code, f"README.md: {title}", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == PRINTED[title]


def test_table_of_extras_is_complete() -> None:
    section = README.split("## Extras\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(Extras.model_fields)
