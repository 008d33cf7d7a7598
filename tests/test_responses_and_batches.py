"""The examples of docs/responses-and-batches.md run, against a server of its own whose model says Paris."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "responses-and-batches.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
PRINTED = [
    " Paris.\n['message', 'message', 'message']\n Paris.",
    " Paris.\n Paris.",
    "completed BatchRequestCounts(completed=3, failed=0, total=3)\nLyon True\nPorto True\nTurin True\n",
]
DEFAULT_URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("state")
    script = ROOT / "packages" / "server" / "tests" / "fake_server.py"
    command = [sys.executable, str(script), "serve", "--port", "0", "--state-dir", str(folder)]
    environment = {**os.environ, "COLUMNS": "300", "OCTAVO_API_KEY": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield next(match[0] for line in process.stderr if (match := re.search(r"http://\S+", line)))
        process.kill()


@pytest.mark.parametrize(("code", "printed"), list(zip(EXAMPLES, PRINTED, strict=True)))
def test_example_answers(url: str, code: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert DEFAULT_URL in code
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.replace(DEFAULT_URL, url), "responses-and-batches.md", "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out == printed


def test_every_option_that_is_named_exists() -> None:
    readme = (ROOT / "packages" / "server" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= set(re.findall(r"`(--[a-z-]+)`", readme))
