"""The script for machines with a GPU runs to its end, in tiny sizes in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device.py"
PARTS = ("correctness", "ceilings", "small", "sampling")


def test_the_parts_on_kernels_run_and_every_kernel_is_right(tmp_path):
    only = [argument for part in PARTS for argument in ("--only", part)]
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path), *only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    documents = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in PARTS}
    assert all(document["kind"] == "smoke run: the timings mean nothing" for document in documents.values())
    rows = documents["correctness"]["rows"]
    assert len(rows) >= 30
    assert all(row.get("met", True) and row.get("same_bits", True) for row in rows)
    assert not [row for document in documents.values() for row in document["rows"] if "not_measured" in row]
