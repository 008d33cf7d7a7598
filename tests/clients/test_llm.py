"""The `llm` command line tool, unchanged, with the demo model as one of its OpenAI-compatible models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUESTION = "What is the capital of France?"
MODELS = """\
- model_id: octavo
  model_name: smollm2
  api_base: {url}/v1
  can_stream: true
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture
def llm(url, tmp_path):
    """Run `llm` with a configuration that names the server; return what it prints."""
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=url))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    program = str(Path(sys.executable).with_name("llm"))

    def run(*arguments: str) -> str:
        command = [program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_model_is_listed(llm):
    assert "octavo" in llm("models")


@pytest.mark.parametrize("how", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_a_question_is_answered(llm, how):
    assert "Paris" in llm("-m", "octavo", *how, "-o", "temperature", "0", "-o", "max_tokens", "24", QUESTION)


def test_a_conversation_goes_on(llm):
    options = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    llm("-m", "octavo", *options, QUESTION)
    assert llm("-c", *options, "And of Italy?")


def test_an_answer_fits_a_schema(llm):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}},
        "required": ["name"],
        "additionalProperties": False,
    }
    answer = llm("-m", "octavo", "--schema", json.dumps(schema), "-o", "max_tokens", "40", QUESTION)
    assert set(json.loads(answer)) == {"name"}
