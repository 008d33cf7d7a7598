"""KV caches by dtype: bytes of a block, and the speed of decode steps of many rows over long contexts.

    python benchmarks/kv_dtypes.py --out benchmarks/results/kv_dtypes
    python benchmarks/kv_dtypes.py --dtypes float32 int8 --context 256 --rounds 2

Every round runs all contestants in turn, on prompts whose blocks are in the prefix cache, so that next to nothing but
decode steps is timed. Ratios are to the first contestant of the same round; their median is reported.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from workload import english_ids

from octavo_engine import LLM, SamplingParams


def load(arguments: argparse.Namespace, ids: list[int], dtype: str) -> LLM:
    """Load the model with a KV cache of a dtype, large enough for all rows, and fill its prefix cache."""
    length = arguments.context + arguments.tokens
    llm = LLM(
        arguments.model,
        mode=arguments.mode,
        kv_cache_dtype=dtype,
        num_blocks=arguments.rows * (length // 16 + 2) + 1,
        max_num_seqs=arguments.rows,
        show_progress=False,
    )
    decode(llm, arguments, ids)
    return llm


def decode(llm: LLM, arguments: argparse.Namespace, ids: list[int]) -> float:
    """Return the tokens per second of all rows together."""
    prompts = [
        {"prompt_token_ids": ids[row * arguments.context :][: arguments.context]} for row in range(arguments.rows)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, sampling)
    return arguments.rows * arguments.tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="file, folder or hub id; the demo model if left out")
    parser.add_argument("--mode", default="exact")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write OUT.json")
    arguments = parser.parse_args()
    ids = english_ids(arguments.model)
    if len(ids) < arguments.rows * arguments.context:
        parser.error(f"the text has {len(ids)} tokens, fewer than --rows x --context")
    engines = {dtype: load(arguments, ids, dtype) for dtype in arguments.dtypes}
    rounds = [{dtype: decode(llm, arguments, ids) for dtype, llm in engines.items()} for _ in range(arguments.rounds)]

    first = arguments.dtypes[0]
    found: dict[str, Any] = {}
    for dtype, llm in engines.items():
        info = llm.info
        found[dtype] = {
            "bytes_per_block": info.kv_cache_bytes // info.num_blocks,
            "tokens_per_second": [round(speeds[dtype], 1) for speeds in rounds],
            f"median_ratio_to_{first}": median(speeds[dtype] / speeds[first] for speeds in rounds),
        }
        print(f"{dtype:9} {found[dtype]}")
        llm.close()
    if arguments.out:
        settings = {name: getattr(arguments, name) for name in ("mode", "rows", "context", "tokens")}
        arguments.out.with_suffix(".json").write_text(json.dumps({**settings, "dtypes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
