"""What dual batch overlap brings: tokens per second with and without it, over links of several delays.

    sudo python benchmarks/dual_batch.py --out benchmarks/results/dual_batch

Two ranks of a random Llama, of one thread and one core each, in network namespaces of their own, with a link between
them that delays packets (`slow_link.py`; it takes root). Each run starts both ranks by torchrun; runs with and without
take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from slow_link import ADDRESSES, DEVICE, SlowLink, slow_link

PORT = 29577
MEASURES = ("prompts", "decoding")


def write_model(folder: Path) -> None:
    """Write a random Llama of 8 layers, which two ranks can share, and a tokenizer of bytes."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models

    from octavo_engine.testing import random_weights, tiny_config
    from octavo_engine.text.byte_alphabet import CHAR_OF_BYTE

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_layers": 8, "head_dim": 64}
    config = replace(tiny_config(), num_heads=8, num_kv_heads=4, max_position_embeddings=2048, vocab_size=256, **sizes)
    save_file(random_weights(config), folder / "model.safetensors")
    same = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "max_position_embeddings")
    values = {name: getattr(config, name) for name in same}
    values |= {"architectures": [config.architecture], "num_hidden_layers": config.num_layers, "eos_token_id": 2}
    values |= {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    values["tie_word_embeddings"] = config.tie_word_embeddings
    (folder / "config.json").write_text(json.dumps(values))
    vocabulary = {char: token_id for token_id, char in enumerate(CHAR_OF_BYTE.values())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def run_ranks(link: SlowLink, model: Path, *, enable_dbo: bool) -> dict[str, float]:
    """Start both ranks; return rank 0's tokens per second."""
    ranks = []
    for index, name in enumerate(link.names):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--node-rank", str(index), "--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
        command = [*torchrun, __file__, "--rank-of", str(model), *(["--dbo"] if enable_dbo else [])]
        environ = os.environ | {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, "taskset", "-c", str(index), *command],
                stdout=subprocess.PIPE,
                env=environ,
                text=True,
            )
        )
    said, _ = ranks[0].communicate(timeout=300)
    ranks[1].communicate(timeout=60)
    if ranks[0].returncode:
        raise SystemExit(f"rank 0 ended with {ranks[0].returncode}; what it wrote is above")
    figures: dict[str, float] = json.loads(said.splitlines()[-1])
    return figures


def be_a_rank(model: str, *, enable_dbo: bool) -> None:
    """Serve as one of the ranks; rank 0 prints what it measured as JSON."""
    from octavo_engine import LLM
    from octavo_engine.parallel.follower import follow
    from octavo_engine.parallel.torchrun import TorchrunRank

    rank = TorchrunRank.of(os.environ)
    assert rank is not None, "torchrun starts this"
    if rank.rank:
        follow(rank.host, rank.port, rank.rank, join_seconds=60, local_rank=rank.local_rank, in_lobby=True)
        return
    options = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "num_blocks": 400, "num_threads": 1}
    with LLM(
        model, **options, tensor_parallel_size=2, enable_dbo=enable_dbo, prefix_cache=False, show_progress=False
    ) as llm:
        run = {
            "prompts": lambda: tokens_per_second(llm, num_prompts=8, length=256, num_tokens=1),
            "decoding": lambda: tokens_per_second(llm, num_prompts=32, length=4, num_tokens=32),
        }
        figures = {name: statistics.median(measure() for _ in range(3)) for name, measure in run.items()}
    print(json.dumps(figures), flush=True)


def tokens_per_second(llm: object, *, num_prompts: int, length: int, num_tokens: int) -> float:
    """Return how many tokens of prompts and answers are computed in a second."""
    from octavo_engine import LLM, SamplingParams

    assert isinstance(llm, LLM)
    prompts = [
        {"prompt_token_ids": [(7 * row + place) % 250 + 3 for place in range(length)]} for row in range(num_prompts)
    ]
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    return num_prompts * (length + num_tokens) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 5], help="milliseconds, each way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to put JSON and a plot, without a suffix")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--dbo", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        be_a_rank(arguments.rank_of, enable_dbo=arguments.dbo)
        return
    if os.geteuid():
        raise SystemExit("expected to be run by root, who alone may make network namespaces; use sudo")
    figures = []
    with tempfile.TemporaryDirectory() as folder, slow_link() as link:
        write_model(Path(folder))
        for delay in arguments.delays:
            link.delay = delay / 1000
            rounds = [
                [run_ranks(link, Path(folder), enable_dbo=enable_dbo) for enable_dbo in (False, True)]
                for _ in range(arguments.rounds)
            ]
            for name in MEASURES:
                whole, halved = (statistics.median(one[side][name] for one in rounds) for side in range(2))
                ratio = statistics.median(one[1][name] / one[0][name] for one in rounds)
                figures.append({"delay_ms": delay, "of": name, "whole": whole, "halved": halved, "ratio": ratio})
                print(f"{delay:5g} ms, {name:8}: {whole:8.0f} tokens/s whole, {halved:8.0f} halved, {ratio:5.2f} times")
    if arguments.out is not None:
        arguments.out.with_suffix(".json").write_text(
            json.dumps({"rounds": arguments.rounds, "figures": figures}, indent=1)
        )
        plot(figures, arguments.out.with_suffix(".png"))


def plot(figures: list[dict[str, object]], path: Path) -> None:
    """Draw the ratios over the delays."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name in MEASURES:
        own = [one for one in figures if one["of"] == name]
        axes.plot([one["delay_ms"] for one in own], [one["ratio"] for one in own], marker="o", label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="delay of the link, ms each way", ylabel="tokens/s, halved over whole", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
