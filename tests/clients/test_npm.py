"""What comes from npm: the openai SDK against the served demo model (npm/openai.test.mjs); pyright on our client."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

README = Path(__file__).parents[2] / "packages/client/README.md"
MISTAKE = "import octavo_client\n\noctavo_client.Octavo(max_retries='three')\n"


def test_the_npm_sdk_is_served(url):
    environment = os.environ | {"OCTAVO_URL": url}
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", "openai.test.mjs"], cwd=os.environ["OCTAVO_NPM"], env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def pyright(folder: Path, code: str) -> tuple[int, str]:
    folder.mkdir()
    (folder / "code.py").write_text(code, encoding="utf-8")
    # Without a list of its own it looks at nothing below a folder whose name begins with a dot, as nox's does.
    (folder / "pyrightconfig.json").write_text('{"exclude": []}')
    program = Path(os.environ["OCTAVO_NPM"], "node_modules/.bin/pyright")
    python = Path(os.environ["OCTAVO_PROGRAM"]).with_name("python")
    done = subprocess.run(
        [program, "--pythonpath", python, "--project", folder], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_pyright_has_nothing_to_say_of_the_clients_examples_but_finds_a_mistake(tmp_path):
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    status, output = pyright(tmp_path / "examples", "# pyright: strict\n" + "\n".join(examples))
    assert status == 0, output
    status, output = pyright(tmp_path / "mistake", MISTAKE)
    assert status == 1, output
    assert "reportArgumentType" in output
