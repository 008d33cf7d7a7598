"""Beam search on a CPU beside Transformers and vLLM: the same prompts, all at once, each run in its own process.

    python benchmarks/beam_search.py                                       # ours and Transformers
    python benchmarks/beam_search.py --peers RUNNERS --peers-home FOLDER --rounds 3

RUNNERS holds `run_vllm.py`, which takes a workload file and `--beam-width`; FOLDER holds the virtual environments
`vllm` and `hf` and the model `smollm2` in Hugging Face layout, by default $PEERS_HOME. Without them Transformers runs
in this environment, on the demo model's file. Engines alternate: a round measures each once. Every request searches
for exactly its output length (end-of-text ignored); output tokens are those of the best hypothesis alone, for every
engine. The table, the ratios against the project's targets (at least 20 times vLLM, 4 times Transformers) and OUT.json
with its plot come last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import peak_rss_mb
from throughput.process import MeasurementFailed, measure
from workload import WorkloadRequest, describe, english_ids, make_workload, with_text

BENCHMARKS = Path(__file__).resolve().parent
TARGETS = {"transformers": 4.0, "vllm": 20.0}
PAD = 2  # end-of-text of the demo model


def run_octavo(requests: list[WorkloadRequest], width: int) -> Callable[[], dict[str, Any]]:
    """Load our engine; return what searches, and what it held at most."""
    from octavo_engine import LLM, BeamSearchParams

    llm = LLM(show_progress=False, max_num_seqs=max(128, width), kv_cache_bytes=1 << 30)
    prompts = [{"prompt_token_ids": r["prompt_ids"]} for r in requests]
    params = [BeamSearchParams(beam_width=width, max_tokens=r["out"], ignore_eos=True) for r in requests]
    llm.beam_search({"prompt_token_ids": requests[0]["prompt_ids"][::-1]}, params[0])

    def search() -> dict[str, Any]:
        outputs = llm.beam_search(prompts, params)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        if lengths != [r["out"] for r in requests]:
            raise RuntimeError(f"hypotheses of {[r['out'] for r in requests]} tokens were expected, got {lengths}")
        return {"num_copies": llm.stats().cache.num_copies, "kernels": llm.info.kernel_backend}

    return search


def run_transformers(requests: list[WorkloadRequest], width: int) -> Callable[[], dict[str, Any]]:
    """Load Transformers in float32; return what searches all prompts in one batch, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = Path(os.environ.get("PEERS_HOME", "/nowhere")) / "smollm2"
    if folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        from transformers import GgufConfig

        from octavo_engine.weights.locate import locate_model

        path = Path(locate_model(None))
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=config
        )
        model = model.float().eval()
    model.generation_config.eos_token_id = None
    longest, steps = max(len(r["prompt_ids"]) for r in requests), max(r["out"] for r in requests)
    ids = torch.full((len(requests), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request["prompt_ids"]) :] = torch.tensor(request["prompt_ids"])
        mask[row, longest - len(request["prompt_ids"]) :] = 1

    def search() -> dict[str, Any]:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=steps, num_beams=width, do_sample=False, pad_token_id=PAD
        )
        return {"batch": len(requests)}

    return search


RUNNERS = {"octavo": run_octavo, "transformers": run_transformers}


def run_here(engine: str, workload: Path, width: int) -> None:
    """Measure an engine in this process and print its line."""
    requests: list[WorkloadRequest] = json.loads(workload.read_text())
    started = time.perf_counter()
    search = RUNNERS[engine](requests, width)
    load_seconds = time.perf_counter() - started
    started = time.perf_counter()
    settings = search()
    seconds = time.perf_counter() - started
    num_tokens = sum(r["out"] for r in requests)
    line = {
        "engine": engine,
        "settings": settings | {"beam_width": width},
        "seconds": round(seconds, 2),
        "output_tokens_per_s": round(num_tokens / seconds, 1),
        "load_seconds": round(load_seconds, 1),
        "peak_rss_mb": peak_rss_mb(),
    }
    print(json.dumps(line))


def commands(arguments: argparse.Namespace, workload: Path) -> dict[str, list[str]]:
    """Return the command that measures each engine, in the order in which they take turns."""
    own = [str(Path(__file__).resolve()), str(workload), "--width", str(arguments.width), "--run"]
    found = {"octavo": [sys.executable, *own, "octavo"]}
    hf = arguments.peers_home / "hf" / "bin" / "python"
    found["transformers"] = [str(hf) if hf.exists() else sys.executable, *own, "transformers"]
    if arguments.peers:
        python = str(arguments.peers_home / "vllm" / "bin" / "python")
        runner = [python, str(arguments.peers.resolve() / "run_vllm.py"), str(workload)]
        found["vllm"] = [*runner, "--dtype", "float32", "--beam-width", str(arguments.width)]
    return {engine: found[engine] for engine in arguments.engines.split(",") if engine in found}


def table(lines: list[dict[str, Any]]) -> str:
    """Return medians and ratios as Markdown."""
    engines = dict.fromkeys(line["engine"] for line in lines)
    median = {e: statistics.median(ln["output_tokens_per_s"] for ln in lines if ln["engine"] == e) for e in engines}
    rows = [
        "| engine | output tok/s | octavo / this | target | load s | peak RSS MB | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine in engines:
        own = [line for line in lines if line["engine"] == engine]
        ratio = f"{median['octavo'] / median[engine]:.1f}" if "octavo" in median else "-"
        rows.append(
            f"| {engine} | {median[engine]:.1f} | {ratio} | {TARGETS.get(engine, '-')}"
            f" | {statistics.median(line['load_seconds'] for line in own):.1f}"
            f" | {statistics.median(line['peak_rss_mb'] for line in own):.0f} | {len(own)} |"
        )
    return "\n".join(rows)


def plot(lines: list[dict[str, Any]], width: int, path: Path) -> None:
    """Draw the median rate of each engine; the axis is logarithmic, for the rates are far apart."""
    import matplotlib.pyplot as plt

    engines = list(dict.fromkeys(line["engine"] for line in lines))
    rates = [statistics.median(ln["output_tokens_per_s"] for ln in lines if ln["engine"] == e) for e in engines]
    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    bars = axes.barh(engines[::-1], rates[::-1], color="tab:blue")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("output tokens per second, best hypotheses alone")
    axes.set_title(f"Beam search, width {width}")
    figure.savefig(path, dpi=120)


def make_requests(arguments: argparse.Namespace) -> list[WorkloadRequest]:
    """Draw prompts of ShareGPT-like lengths; outputs have one length, since a padded batch ends with its longest."""
    requests = make_workload(arguments.requests, arguments.seed)
    cut = [WorkloadRequest(prompt_ids=r["prompt_ids"][: arguments.max_prompt], out=arguments.output) for r in requests]
    return with_text(cut, english_ids(), arguments.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path, nargs="?", help="a workload file; made if left out")
    parser.add_argument("--run", choices=sorted(RUNNERS), help="measure one engine here and print its line")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--engines", default="octavo,transformers,vllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--output", type=int, default=64, help="tokens of every output")
    parser.add_argument("--max-prompt", type=int, default=256)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--peers", type=Path, help="folder with run_vllm.py; left out: no vLLM")
    parser.add_argument(
        "--peers-home", type=Path, default=Path(os.environ.get("PEERS_HOME", "~/.cache/octavo-peers")).expanduser()
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run may take")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if arguments.run:
        run_here(arguments.run, arguments.workload, arguments.width)
        return
    lines: list[dict[str, Any]] = []
    environment = {"HF_HUB_OFFLINE": "1", "PEERS_HOME": str(arguments.peers_home)}
    with tempfile.TemporaryDirectory() as folder:
        workload = arguments.workload and arguments.workload.resolve()
        if workload is None:
            workload = Path(folder) / "workload.json"
            workload.write_text(json.dumps(make_requests(arguments)))
        print(f"beam width {arguments.width}: {describe(json.loads(workload.read_text()))}", flush=True)
        for number in range(arguments.rounds):
            for engine, command in commands(arguments, workload).items():
                try:
                    line = measure(command, environment=environment, timeout=arguments.timeout) | {"engine": engine}
                except MeasurementFailed as error:
                    print(f"round {number + 1}, {engine}: FAILED, {error}", flush=True)
                    continue
                lines.append(line)
                print(f"round {number + 1}, {engine}: {line['output_tokens_per_s']:.1f} output tok/s", flush=True)
    print(table(lines))
    if arguments.out:
        text = json.dumps({"beam_width": arguments.width, "targets": TARGETS, "lines": lines}, indent=1)
        arguments.out.with_suffix(".json").write_text(text + "\n")
        plot(lines, arguments.width, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
