"""The openai npm SDK, unchanged, against the served demo model: the checks are in npm/openai.test.mjs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).with_name("npm")


def test_the_npm_sdk_is_served(url):
    environment = os.environ | {"OCTAVO_URL": url}
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", "openai.test.mjs"], cwd=os.environ["OCTAVO_NPM"], env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
