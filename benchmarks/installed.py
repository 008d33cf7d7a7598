"""Installation: this checkout's packages as a user has them, from wheels, for benchmarks of whole programs.

A checkout starts more slowly than an installation: it compares the native library with its sources, and where
PYTHONDONTWRITEBYTECODE is set every start compiles its modules anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("client", "engine", "kernels", "kvcache", "server")
OF_CHECKOUTS = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")


@dataclass(frozen=True)
class Installation:
    """A virtual environment that holds the wheels; what they need comes from the interpreter that made it."""

    folder: Path

    def program(self, name: str) -> str:
        """Return the path of a program that the wheels bring."""
        return str(self.folder / "bin" / name)

    @property
    def environment(self) -> dict[str, str]:
        """The variables to run a program with: nothing in them leads back to a checkout."""
        return {name: value for name, value in os.environ.items() if name not in OF_CHECKOUTS}


def install(folder: Path) -> Installation:
    """Build the packages' wheels and install them into a new virtual environment in `folder`.

    The interpreter that runs this needs pip and hatchling; nothing is downloaded.
    """
    installation, wheels = Installation(folder / "environment"), folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    sources = [str(ROOT / "packages" / package) for package in PACKAGES]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, *sources], check=True)
    venv.create(installation.folder)
    python = installation.program("python")
    files = [str(path) for path in wheels.glob("*.whl")]
    subprocess.run([*pip, "--python", python, "install", "--no-deps", *files], check=True, env=installation.environment)
    packages = sysconfig.get_path("purelib", "venv", vars={"base": str(installation.folder)})
    Path(packages, "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return installation
