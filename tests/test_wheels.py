"""The built wheels: what lies in each, how large it is, and what it says about itself."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "kvcache", "engine", "client", "server")
MAX_BYTES = 2_000_000

# Siblings that a plain install takes, and those that the extras add.
SIBLINGS = {
    "kernels": set(),
    "kvcache": {"octavo-kernels; extra == 'torch'"},
    "engine": {"octavo-kvcache", "octavo-kernels; extra == 'local'", "octavo-kvcache[torch]; extra == 'local'"},
    "client": set(),
    "server": {"octavo-client", "octavo-engine", "octavo-engine[local,structured]; extra == 'local'"},
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    sources = [str(ROOT / "packages" / package) for package in PACKAGES]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, *sources], check=True)
    return {wheel.name.split("-")[0].removeprefix("octavo_"): wheel for wheel in folder.iterdir()}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_every_package_makes_one_wheel(wheels: dict[str, Path]) -> None:
    assert sorted(wheels) == sorted(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_the_package_and_nothing_else(wheels: dict[str, Path], package: str) -> None:
    with zipfile.ZipFile(wheels[package]) as archive:
        names = archive.namelist()
    module = f"octavo_{package}"
    assert {name.split("/")[0] for name in names} == {
        module,
        next(n for n in names if n.endswith("/METADATA")).split("/")[0],
    }
    assert f"{module}/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "tests/" in name or "__pycache__" in name or name.endswith((".pyc", ".gguf"))]
    sources = ROOT / "packages" / package / "src"
    tracked = subprocess.run(["git", "ls-files", str(sources)], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {str((ROOT / line).relative_to(sources)) for line in tracked.stdout.splitlines() if line.endswith(".py")}
    assert modules <= set(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_is_small(wheels: dict[str, Path], package: str) -> None:
    assert wheels[package].stat().st_size < MAX_BYTES


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_says_what_it_is(wheels: dict[str, Path], package: str) -> None:
    headers = metadata(wheels[package])
    assert headers["Name"] == f"octavo-{package}"
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers["Requires-Python"] == ">=3.11"
    assert headers.get_payload().startswith(f"# octavo-{package}\n")


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_takes_siblings_by_range(wheels: dict[str, Path], package: str) -> None:
    siblings = [line for line in metadata(wheels[package]).get_all("Requires-Dist", []) if line.startswith("octavo-")]
    assert {line.replace("<0.2,>=0.1", "") for line in siblings} == SIBLINGS[package]
    assert all("<0.2,>=0.1" in line for line in siblings)
