"""What the prefix cache spares: whole blocks beside hits within a block, and blocks of equal content held once.

    python benchmarks/prefix_hits.py                    # counts, on a model of 0 ms
    python benchmarks/prefix_hits.py --times            # and times, on the demo model

The first workload is a chat: users share a few system prompts, each says something, is answered, and goes on; three
turns in ten are edited, so that a conversation leaves the one before it at any token. The turns of a round come in
bursts. In the second, eight users ask about one document at once. Lengths are log-normal, tokens are random: texts
agree only where they are the same. The counts are exact on any machine; the times (to the first token, one request at a
time; of copying a block and of computing a token of a prompt) need a quiet one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

from timing import seconds
from workload import lognormal_length

from octavo_engine import EngineConfig, Request, SamplingParams
from octavo_engine.engine import Engine
from octavo_engine.executor.fake import FakeExecutor, hashed_next_token
from octavo_engine.scheduler import Scheduler
from octavo_engine.types import TokenSpan
from octavo_kvcache import BlockCopy, CacheManager

VOCAB_SIZE = 49152
HEADER = [1, 4093, 198]  # what a chat template writes before each message
EDITED = 0.3  # share of turns that change what was said before
BURST, PAUSE = 8, 6  # so many turns come at once, so many steps later the next ones
MAX_MODEL_LEN = 4096
HITS = {"none": "nothing cached", "whole": "whole blocks", "part": "and a part of one"}


@dataclass(frozen=True)
class Chat:
    """How large the workload is; lengths are means, in tokens."""

    num_systems: int
    num_users: int
    num_rounds: int
    system_tokens: int
    message_tokens: int
    answer_tokens: int


CHATS = {
    "chat": Chat(4, num_users=24, num_rounds=3, system_tokens=200, message_tokens=40, answer_tokens=80),
    "document": Chat(1, num_users=8, num_rounds=1, system_tokens=800, message_tokens=20, answer_tokens=80),
}


@dataclass(frozen=True)
class Counts:
    """One run, counted."""

    case: str
    block_size: int
    hits: str
    deduplicate: bool
    num_requests: int
    num_prompt_tokens: int
    computed: float  # share of the prompt tokens
    num_copies: int
    num_evictions: int
    num_deduplicated: int
    mean_blocks: float  # held, over the steps


class Users:
    """What the users of a chat say, round by round; the same seed says the same."""

    def __init__(self, chat: Chat, seed: int) -> None:
        self._chat = chat
        self._rng = rng = random.Random(seed)
        systems = [self._message(chat.system_tokens) for _ in range(chat.num_systems)]
        self._histories = [list(rng.choice(systems)) for _ in range(chat.num_users)]

    def prompts(self) -> list[list[int]]:
        """Let each user say something, after what was said or after a part of it."""
        for user, history in enumerate(self._histories):
            if self._rng.random() < EDITED:
                last_turn = self._chat.message_tokens + self._chat.answer_tokens
                first = max(len(history) - last_turn, 1)
                history = history[: self._rng.randrange(first, len(history) + 1)]
            self._histories[user] = history + self._message(self._chat.message_tokens)
        return [list(history) for history in self._histories]

    def num_answer_tokens(self) -> int:
        """Draw the length of an answer."""
        return lognormal_length(self._rng, self._chat.answer_tokens, 0.8, 4, 512)

    def hear(self, user: int, answer: list[int]) -> None:
        """Put an answer into a user's conversation."""
        self._histories[user] += answer

    def _message(self, mean_length: int) -> list[int]:
        length = lognormal_length(self._rng, mean_length, 0.8, 4, 1024)
        return HEADER + [self._rng.randrange(100, VOCAB_SIZE) for _ in range(length)]


def talk(engine: Engine, chat: Chat, seed: int) -> Iterator[int]:
    """Run the rounds of a chat; yield the blocks that are held after each step."""
    users = Users(chat, seed)
    for turn in range(chat.num_rounds):
        answers: dict[str, list[int]] = {}
        for user, prompt in enumerate(users.prompts()):
            sampling = SamplingParams(temperature=0, max_tokens=users.num_answer_tokens(), ignore_eos=True)
            engine.add(Request(request_id=f"{turn} {user}", inputs=(TokenSpan(tuple(prompt)),), sampling=sampling))
            answers[f"{turn} {user}"] = []
            burst_is_over = (user + 1) % BURST == 0
            for _ in range(PAUSE if burst_is_over else 0):
                yield step(engine, answers)
        while engine.has_work:
            yield step(engine, answers)
        for user, answer in enumerate(answers.values()):
            users.hear(user, answer)


def step(engine: Engine, answers: dict[str, list[int]]) -> int:
    """Run one step and take in what it brings; return the blocks that are held."""
    for update in engine.step():
        answers[update.request_id] += update.token_ids
    return engine.scheduler.cache.stats().num_used


def count(case: str, block_size: int, hits: str, deduplicate: bool, arguments: argparse.Namespace) -> Counts:
    """Run a chat on a model that takes no time, and count."""
    chat = CHATS[case]
    cache = CacheManager(
        arguments.tokens // block_size,
        block_size,
        prefix_cache=hits != "none",
        min_partial_hit=1 if hits == "part" else block_size,
        deduplicate=deduplicate,
    )
    scheduler = Scheduler(
        cache, max_num_seqs=arguments.rows, max_num_batched_tokens=2048, max_model_len=2 * MAX_MODEL_LEN
    )
    engine = Engine(scheduler, FakeExecutor(block_size, hashed_next_token(VOCAB_SIZE)))
    blocks = list(talk(engine, chat, arguments.seed))
    counters, stats = scheduler.counters, cache.stats()
    return Counts(
        case=case,
        block_size=block_size,
        hits=hits,
        deduplicate=deduplicate,
        num_requests=chat.num_users * chat.num_rounds,
        num_prompt_tokens=counters.num_prompt_tokens,
        computed=1 - counters.cached_prompt_tokens.total / counters.num_prompt_tokens,
        num_copies=stats.num_copies,
        num_evictions=stats.num_evictions,
        num_deduplicated=stats.num_deduplicated,
        mean_blocks=mean(blocks),
    )


def first_token_times(chat: Chat, hits: str, arguments: argparse.Namespace) -> list[float]:
    """Return the milliseconds to the first token of each prompt of a chat on a real model, one at a time."""
    from octavo_engine.build import build_engine

    config = EngineConfig(model=arguments.model, kv_cache_bytes=2 << 30, prefix_cache=hits != "none")
    engine = build_engine(config).engine
    if hits == "whole":
        cache = CacheManager(engine.scheduler.cache.num_blocks, config.block_size, min_partial_hit=config.block_size)
        executor = engine._executor
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 1024, "max_model_len": MAX_MODEL_LEN}
        engine = Engine(Scheduler(cache, **limits), executor)
    users, times = Users(chat, arguments.seed), []
    for turn in range(chat.num_rounds):
        for user, prompt in enumerate(users.prompts()):
            sampling = SamplingParams(temperature=0, max_tokens=chat.answer_tokens, ignore_eos=True)
            started, answer = time.perf_counter(), []
            engine.add(Request(request_id=f"{turn} {user}", inputs=(TokenSpan(tuple(prompt)),), sampling=sampling))
            while engine.has_work:
                for update in engine.step():
                    if not answer:
                        times.append(1000 * (time.perf_counter() - started))
                    answer += update.token_ids
            users.hear(user, answer)
    engine.close()
    return times


def copy_beside_token(arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the microseconds of copying a block, and of computing one token more of a prompt."""
    from octavo_engine.build import build_engine

    config = EngineConfig(model=arguments.model, kv_cache_bytes=1 << 30, prefix_cache=False)
    engine = build_engine(config).engine
    storage = engine._executor._runner.storage
    copy = seconds(lambda: storage.apply([BlockCopy(1, 2)]), at_least=0.5)

    def prefill(num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        engine.add(Request(request_id="r", inputs=(TokenSpan(tuple(range(100, 100 + num_tokens))),), sampling=sampling))
        while engine.has_work:
            engine.step()

    prefill(512)
    long = median(seconds(lambda: prefill(512), at_least=0) for _ in range(3))
    short = median(seconds(lambda: prefill(256), at_least=0) for _ in range(3))
    engine.close()
    return 1e6 * copy, 1e6 * (long - short) / 256


def table(rows: list[Counts]) -> str:
    """Return a Markdown table, one row per workload and block size."""
    lines = [
        f"| | block size | computed: {' | '.join(HITS.values())} | copies | equal blocks once: memory saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, block_size in dict.fromkeys((row.case, row.block_size) for row in rows):
        alike = [row for row in rows if (row.case, row.block_size) == (case, block_size)]
        own = {row.hits: row for row in alike if not row.deduplicate}
        computed = " | ".join(f"{own[hits].computed:.1%}" for hits in HITS)
        saved = 1 - next(row for row in alike if row.deduplicate).mean_blocks / own["part"].mean_blocks
        lines.append(f"| {case} | {block_size} | {computed} | {own['part'].num_copies} | {saved:.1%} |")
    return "\n".join(lines)


def plot(rows: list[Counts], path: Path) -> None:
    """Draw the share of a chat's tokens that is computed, and what is held of the document's users, by block size."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    sizes = list(dict.fromkeys(row.block_size for row in rows))
    for place, (hits, name) in enumerate(list(HITS.items())[1:]):
        own = [row for row in rows if row.case == "chat" and row.hits == hits and not row.deduplicate]
        values = [100 * row.computed for row in own]
        bars = left.bar([i + 0.4 * place - 0.2 for i in range(len(sizes))], values, 0.38, label=name)
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set_ylabel("prompt tokens computed, %")
    left.set_title("a chat whose turns part at any token", fontsize=9)
    for place, deduplicate in enumerate((False, True)):
        values = [
            row.mean_blocks * row.block_size
            for row in rows
            if row.case == "document" and row.hits == "part" and row.deduplicate == deduplicate
        ]
        name = "equal blocks once" if deduplicate else "each its own"
        bars = right.bar([i + 0.4 * place - 0.2 for i in range(len(sizes))], values, 0.38, label=name)
        right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set_ylabel("slots held, mean over steps")
    right.set_title("eight users, one document, at once", fontsize=9)
    for axes in (left, right):
        axes.set_xticks(range(len(sizes)), [f"blocks of {size}" for size in sizes])
        axes.margins(y=0.25)  # room for the legend
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--cases", default=",".join(CHATS))
    parser.add_argument("--rows", type=int, default=32, help="sequences that run at once")
    parser.add_argument("--tokens", type=int, default=1 << 17, help="of the KV cache")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--times", action="store_true", help="measure a real model too")
    parser.add_argument("--model", default=None, help="for the times; the demo model if left out")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    rows = []
    for case, block_size in product(arguments.cases.split(","), arguments.block_sizes):
        for hits, deduplicate in (("none", False), ("whole", False), ("part", False), ("part", True)):
            rows.append(count(case, block_size, hits, deduplicate, arguments))
            print(f"{case}, blocks of {block_size}, {HITS[hits]}: {rows[-1].computed:.1%} computed", flush=True)
    print(table(rows))
    chats = {case: asdict(chat) for case, chat in CHATS.items()}
    document: dict[str, object] = {"chats": chats, "rows": [asdict(row) for row in rows]}
    if arguments.times:
        few = replace(CHATS["chat"], num_users=4, num_rounds=3, answer_tokens=24)
        times = {hits: first_token_times(few, hits, arguments) for hits in HITS}
        for hits, own in times.items():
            print(f"{HITS[hits]}: {median(own):.0f} ms to the first token (median of {len(own)})")
        copy, token = copy_beside_token(arguments)
        print(f"a block is copied in {copy:.0f} us, a token of a prompt computed in {token:.0f} us")
        document |= {"first_token_ms": times, "copy_us": copy, "token_us": token}
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
