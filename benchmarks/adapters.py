"""What adapters cost: tokens per second of a batch whose rows have adapters, beside the same batch of the base model.

    python benchmarks/adapters.py --out benchmarks/results/adapters

One engine runs both in turn, in many short rounds: 32 rows of the base model, and 32 rows that share 8 random adapters
of rank 16 on all linears, kept in bfloat16. The median of the rounds' ratios counts, for the two batches of a round see
the same machine; absolute figures move from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from octavo_engine import LLM, SamplingParams
from octavo_engine.models.config import ModelConfig
from octavo_engine.weights.source import open_source

TARGET = 0.85


@dataclass(frozen=True)
class Figure:
    """One batch: tokens per second of both, medians over rounds, and the median and quartiles of the rounds' ratios.

    `rounds` are the rates of each round, with adapters and of the base.
    """

    rows: int
    adapters: int
    rank: int
    tokens_per_second: float
    tokens_per_second_of_base: float
    ratio: float
    quartiles: tuple[float, float]
    rounds: list[tuple[float, float]]

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.adapters} adapters of rank {self.rank}: {self.tokens_per_second:8.1f} tokens/s, "
            f"base {self.tokens_per_second_of_base:8.1f} tokens/s, {self.ratio:6.3f} of the base's "
            f"(half of the rounds from {self.quartiles[0]:.3f} to {self.quartiles[1]:.3f}; target {TARGET})"
        )


def linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of every linear of a Llama, by its name in a checkpoint."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    in_layer = {
        "self_attn.q_proj": (hidden, heads),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (heads, hidden),
        "mlp.gate_proj": (hidden, mlp),
        "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }
    return {f"model.layers.{i}.{name}": size for i in range(config.num_layers) for name, size in in_layer.items()}


def write_adapter(folder: Path, config: ModelConfig, rank: int, seed: int) -> None:
    """Write a random adapter in the layout of PEFT."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_inputs, num_outputs) in linears(config).items():
        a = torch.randn(rank, num_inputs, generator=generator) * num_inputs**-0.5
        b = torch.randn(num_outputs, rank, generator=generator) * 0.01
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def tokens_per_second(llm: LLM, names: list[str | None], num_tokens: int) -> float:
    """Return how fast a batch with these adapters is, its short prompts included."""
    rng = random.Random(0)
    prompts = [{"prompt_token_ids": [rng.randrange(100, 40_000) for _ in range(16)]} for _ in names]
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), adapter=names)
    return len(names) * num_tokens / (time.perf_counter() - started)


def measure(
    model: str | None, *, num_rows: int, num_adapters: int, rank: int, num_tokens: int, num_rounds: int
) -> Figure:
    """Run the batch with adapters and without in turn."""
    config = open_source(model).config
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            model,
            enable_lora=True,
            max_loras=num_adapters,
            max_lora_rank=rank,
            lora_dtype="bfloat16",
            max_num_seqs=num_rows,
            max_model_len=16 + num_tokens,
            mode="exact",
            prefix_cache=False,
            show_progress=False,
        ) as llm,
    ):
        for index in range(num_adapters):
            write_adapter(Path(folder, str(index)), config, rank, index)
            llm.load_adapter(str(index), str(Path(folder, str(index))))
        adapted: list[str | None] = [str(row % num_adapters) for row in range(num_rows)]
        base: list[str | None] = [None] * num_rows
        rounds: list[tuple[float, float]] = []
        for number in range(num_rounds + 1):  # who goes first changes from round to round
            first, second = (adapted, base) if number % 2 else (base, adapted)
            one, other = tokens_per_second(llm, first, num_tokens), tokens_per_second(llm, second, num_tokens)
            rounds.append((one, other) if number % 2 else (other, one))
    rounds = rounds[1:]  # the first one warms up
    ratios = [adapted / base for adapted, base in rounds]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Figure(
        rows=num_rows,
        adapters=num_adapters,
        rank=rank,
        tokens_per_second=statistics.median(r[0] for r in rounds),
        tokens_per_second_of_base=statistics.median(r[1] for r in rounds),
        ratio=ratio,
        quartiles=(low, high),
        rounds=rounds,
    )


def plot(figures: list[Figure], path: Path) -> None:
    """Draw the ratio of every round."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for figure in figures:
        ratios = [adapted / base for adapted, base in figure.rounds]
        axes.plot(range(1, len(ratios) + 1), ratios, "o", label=f"{figure.rows} rows, median {figure.ratio:.3f}")
    axes.axhline(TARGET, color="gray", linestyle="--", label=f"target {TARGET}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="round", ylabel="speed beside the base model's", ylim=(0.6, 1.1))
    axes.set_title(f"{figures[0].adapters} adapters of rank {figures[0].rank} in bfloat16, exact mode")
    axes.legend()
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where to put JSON and a plot, without a suffix")
    args = parser.parse_args()
    figures = []
    for num_rows in args.rows:
        figure = measure(
            args.model,
            num_rows=num_rows,
            num_adapters=args.adapters,
            rank=args.rank,
            num_tokens=args.tokens,
            num_rounds=args.rounds,
        )
        figures.append(figure)
        print(figure, flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"rounds": args.rounds, "tokens": args.tokens, "figures": [asdict(figure) for figure in figures]}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        plot(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
