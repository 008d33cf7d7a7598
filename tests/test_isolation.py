"""The isolation check fails on a copy of the repository whose KV cache imports a sibling it does not declare."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist")


def test_isolation_fails_when_an_undeclared_sibling_is_imported(tmp_path: Path) -> None:
    for name in ("noxfile.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "packages", tmp_path / "packages", ignore=LEFT_OUT)
    module = tmp_path / "packages/kvcache/src/octavo_kvcache/__init__.py"
    module.write_text(module.read_text() + "\nimport octavo_server\n")
    command = [sys.executable, "-m", "nox", "-s", "isolation(kvcache)"]
    environment = {**os.environ, "CXX": "none"}  # native code has no part in it, and takes its time
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert run.returncode == 1, output
    assert "wheels: success" in output
    assert "ModuleNotFoundError: No module named 'octavo_server'" in output
