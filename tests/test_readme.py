"""What the README and the documentation tell a reader to type exists and runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FIRST_SCREEN = 12  # lines
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
OFFLINE = [example for example in EXAMPLES if "LLM()" in str(example.values[0])]


@pytest.fixture(scope="module")
def sessions() -> set[str]:
    command = [sys.executable, "-m", "nox", "--list", "--nocolor"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^[*-] ([\w-]+(?:\([^)]*\))?)", listing, flags=re.MULTILINE)
    return {*names, *(name.partition("(")[0] for name in names)}


def commands(program: str) -> list[str]:
    """Return the lines of all pages that begin with a program, or that quote such a line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += re.findall(rf"^ {{4}}(?:pip install nox && )?({program} [^#\n]*)", text, flags=re.MULTILINE)
        found += re.findall(rf"`({program} [^`\n]*)`", text)
    return sorted({line.strip() for line in found})


@pytest.mark.parametrize("command", ["pip install nox && nox -s demo", "pip install nox && nox -s tests"])
def test_first_screen_has_the_command(command: str) -> None:
    assert command in "\n".join(README.splitlines()[:FIRST_SCREEN])


def test_ci_runs_every_default_session_and_so_the_readmes_test_command() -> None:
    listing = [sys.executable, "-m", "nox", "--list", "--json"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    program = [sys.executable, str(ROOT / ".ci/jobs.py")]
    jobs = subprocess.run(program, input=listed, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {session["session"] for session in json.loads(listed)}
    assert len([name for name in names if name.startswith("tests(")]) > 10
    lines = re.findall(r"^run ([^#&\n]+)", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    ran = {*jobs, *shlex.split(" ".join(lines))}
    assert {name for name in names if name not in ran and name.partition("(")[0] not in ran} == {"wheels"}


def test_every_session_that_is_named_exists(sessions: set[str]) -> None:
    named = {word for line in commands("nox") for word in shlex.split(line.partition(" -- ")[0])[2:]}
    assert named
    assert named <= sessions


def test_every_option_of_octavo_that_is_named_exists() -> None:
    used = [shlex.split(line) for line in commands("octavo")]
    assert used
    help_texts = {command: help_of(command) for command in {words[1] for words in used}}
    for _, command, *arguments in used:
        for option in (argument for argument in arguments if argument.startswith("--") and argument != "--help"):
            assert option in help_texts[command], f"octavo {command} has no {option}"


def help_of(command: str) -> str:
    program = [str(Path(sys.executable).with_name("octavo")), command, "--help"]
    environment = {**os.environ, "COLUMNS": "200"}  # wide enough for no option to be cut
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout


def test_every_relative_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_compiles(code: str) -> None:
    compile(code, "example", "exec")


@pytest.mark.model
@pytest.mark.parametrize("code", OFFLINE)
def test_offline_example_answers(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    assert "Paris" in capsys.readouterr().out
