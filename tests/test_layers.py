"""Each import contract in .importlinter fails on a copy of the sources with one forbidden import added."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "kvcache", "engine", "client", "server")

BROKEN = {  # contract -> file that gets an import, the import
    "layers": ("octavo_kvcache/pool.py", "import octavo_engine.types"),
    "client": ("octavo_client/errors.py", "import torch"),
    "wire": ("octavo_client/wire.py", "import openai"),
    "kernels": ("octavo_kernels/norm.py", "import octavo_kvcache.block"),
    "kernels-triton": ("octavo_kernels/norm.py", "import triton"),
    "kvcache": ("octavo_kvcache/pool.py", "import torch"),
    "kvcache-storage": ("octavo_kvcache/pool.py", "import octavo_kvcache.storage"),
    "engine-core": ("octavo_engine/types.py", "import torch"),
    "server": ("octavo_server/errors.py", "import torch"),
    "server-client": ("octavo_server/errors.py", "import octavo_client.client"),
}


def contracts() -> list[str]:
    heading = "[importlinter:contract:"
    lines = (ROOT / ".importlinter").read_text().splitlines()
    return [line.removeprefix(heading).rstrip("]") for line in lines if line.startswith(heading)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for package in PACKAGES:
        name = f"octavo_{package}"
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "csrc")
        shutil.copytree(ROOT / "packages" / package / "src" / name, folder / name, ignore=ignored)
    return folder


def lint(sources: Path, contract: str) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).with_name("lint-imports"))]
    options = ["--config", str(ROOT / ".importlinter"), "--no-cache", "--no-logo", "--contract", contract]
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    return subprocess.run([*program, *options], env=environment, cwd=sources, capture_output=True, text=True)


def test_every_contract_is_broken_once_below() -> None:
    assert sorted(contracts()) == sorted(BROKEN)


@pytest.mark.parametrize("contract", BROKEN)
def test_contract_fails_when_a_forbidden_import_is_added(sources: Path, contract: str) -> None:
    name, statement = BROKEN[contract]
    assert lint(sources, contract).returncode == 0
    file = sources / name
    text = file.read_text()
    try:
        file.write_text(f"{text}\n{statement}\n")
        broken = lint(sources, contract)
    finally:
        file.write_text(text)
    assert broken.returncode == 1
    assert "Contracts: 0 kept, 1 broken." in broken.stdout
