"""The script for machines with a GPU runs to its end, in tiny sizes in Triton's interpreter."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device.py"
PARTS = ("correctness", "ceilings", "small", "products", "sampling")


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
    measured = [row for document in documents.values() for row in document["rows"]]
    assert not [row for row in measured if "not_measured" in row and "torch" not in row["name"]]
    products = [row["name"] for row in documents["products"]["rows"] if "error" in row]  # those that were right
    for kind in ("W4A16", "W8A16", "FP8, rows", "FP8, groups", "int8", "GGUF q4_0", "GGUF q4_k", "GGUF q6_k"):
        assert [name for name in products if name.startswith(kind)], kind


def test_the_part_on_the_engine_runs(tmp_path, monkeypatch):
    """Ours alone, on the CPU's own kernels: what Triton and Transformers add takes long."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from on_device import engine
    from on_device.bench import Bench
    from on_device.models import llama_config

    bench = Bench("engine", torch.device("cpu"), True, tmp_path / "engine.json", time.monotonic() + 600)
    config = llama_config(smoke=True)
    found = engine._octavo(bench, config, engine._requests(bench, config, 2), 1 << 21)
    assert sorted(found) == ["n=1", "n=3", "reserving", "uncapped"]
    assert all(rate > 0 for rate in found.values())
    assert [row["name"] for row in bench.rows][-1] == "decode by graphs beside op by op, batch 2"
