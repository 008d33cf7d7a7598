"""Writes text to calibrate on, and the text that perplexity is measured on, which shares nothing with it.

    python benchmarks/calibration_text.py --out FOLDER

`evaluation.txt` is the beginning of `workload.english_text`: what `perplexity.py` and `quantization.py` measure on, 10
windows of 512 tokens. `calibration.txt` is prose of the same kind: the rest of that text, then the docstrings of the
standard library's other modules. What has ten words in a row that are also in the evaluated text is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from workload import english_ids

_LEAST_CHARS = 200
_WORDS = 10
_LEFT_OUT = re.compile(
    r"(^|\.)(test|tests|idle_test|idlelib|lib2to3|turtledemo|turtle|tkinter|antigravity|this|ensurepip|pydoc_data|__main__)(\.|$)"
)

Runs = set[tuple[str, ...]]


def runs_of_words(text: str) -> Runs:
    """Return all runs of ten words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + _WORDS]) for start in range(len(words) - _WORDS + 1)}


def module_names() -> Iterator[str]:
    """Yield the standard library's modules, and those of its packages, in an order that does not change."""
    home = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names):
        if _LEFT_OUT.search(name):
            continue
        yield name
        inner = sorted(item.name for item in pkgutil.iter_modules([str(home / name)], f"{name}."))
        yield from (item for item in inner if not _LEFT_OUT.search(item))


def docstrings() -> Iterator[str]:
    """Yield the longer docstrings of modules, classes, functions and methods; modules that do not import have none."""
    for name in module_names():
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
                module = importlib.import_module(name)
        except (Exception, SystemExit):  # of another system, or without what it wraps
            continue
        for value in (module, *vars(module).values()):
            for item in (value, *vars(value).values()) if inspect.isclass(value) else (value,):
                with contextlib.suppress(Exception):  # a descriptor may do anything
                    text = inspect.getdoc(item)
                    if text and len(text) > _LEAST_CHARS:
                        yield text


def calibration_text(rest: str, evaluated: str) -> str:
    """Return `rest` and the docstrings that are neither in it nor in the evaluated text, nor mostly in each other."""
    barred, seen = runs_of_words(evaluated), Runs()
    kept = [part for part in rest.split("\n\n") if not runs_of_words(part) & barred]
    for text in dict.fromkeys(docstrings()):
        runs = runs_of_words(text)
        if text in rest or runs & barred or 2 * len(runs & seen) > len(runs):
            continue
        seen |= runs
        kept.append(text)
    return "\n\n".join(kept)


def main() -> None:
    from octavo_engine.weights.source import open_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="whose tokenizer cuts the text; the demo model if left out")
    parser.add_argument("--tokens", type=int, default=5120, help="of the evaluated text, from its beginning")
    parser.add_argument("--gap", type=int, default=512, help="tokens after these that are in neither")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    tokenizer, ids = open_source(arguments.model).tokenizer(), english_ids(arguments.model)
    evaluated = tokenizer.decode(ids[: arguments.tokens])
    text = calibration_text(tokenizer.decode(ids[arguments.tokens + arguments.gap :]), evaluated)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.txt").write_text(evaluated, encoding="utf-8")
    (arguments.out / "calibration.txt").write_text(text, encoding="utf-8")
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    print(f"{num_tokens} tokens to calibrate on, sha256 {digest}..., in {arguments.out}")


if __name__ == "__main__":
    main()
