"""The command `octavo quantize`: rounds a model's linears to few bits, and says what that does to its perplexity."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from octavo_engine.errors import InvalidConfig
from octavo_server import options

if TYPE_CHECKING:
    from octavo_engine.quant.calibrate.options import QuantizeOptions
    from octavo_engine.quant.calibrate.text import CutText
    from octavo_engine.weights.source import Source

_ALL_INPUTS = -1

Out = Annotated[Path, typer.Option(help="Folder to write; new or empty.")]
Text = Annotated[
    Path | None, typer.Option(help="Text file, UTF-8, to calibrate on; its end weighs the result unless --eval-text.")
]
EvalText = Annotated[Path | None, typer.Option(help="Text file to weigh the result by.")]
Method = Annotated[str, typer.Option(help="gptq, awq, or rtn: round to nearest, by no text.")]
Bits = Annotated[int, typer.Option(help="Of a weight: 2, 3, 4 or 8; awq has 4.")]
GroupSize = Annotated[int, typer.Option(help="Inputs that share a scale; -1 is all of a linear's.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="Zero is the middle of the codes; not of awq.")]
ActOrder = Annotated[bool, typer.Option("--act-order", help="Of gptq: round the largest inputs' weights first.")]
Damping = Annotated[float, typer.Option(help="Of gptq: share of its mean that is added to the Hessian's diagonal.")]
DescentRounds = Annotated[
    int, typer.Option(help="Of gptq: how often each linear's codes and scales are looked at again.")
]
TuneSteps = Annotated[
    int, typer.Option(help="Of gptq: steps of 4 sequences in which scales and norms are then learnt together.")
]
NumSequences = Annotated[int, typer.Option(help="Sequences that linears are rounded by, at most.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens of each sequence.")]
NumEvalSequences = Annotated[int, typer.Option(help="Sequences to weigh the result by, at most; 0 does not.", min=0)]


def quantize(
    out: Out,
    model: options.ModelArgument = None,
    method: Method = "gptq",
    bits: Bits = 4,
    group_size: GroupSize = 32,
    symmetric: Symmetric = False,
    act_order: ActOrder = False,
    damping: Damping = 0.01,
    descent_rounds: DescentRounds = 3,
    tune_steps: TuneSteps = 0,
    text: Text = None,
    eval_text: EvalText = None,
    num_sequences: NumSequences = 64,
    sequence_length: SequenceLength = 512,
    num_eval_sequences: NumEvalSequences = 16,
) -> None:
    """Write a checkpoint with linears of few bits, by GPTQ or AWQ, and print its perplexity and the model's."""
    from octavo_engine.quant.calibrate.folder import check_new
    from octavo_engine.quant.calibrate.options import QuantizeOptions
    from octavo_engine.quant.calibrate.quantize import quantize_checkpoint
    from octavo_engine.weights.source import open_source

    wanted = QuantizeOptions(
        method=method,
        bits=bits,
        group_size=None if group_size == _ALL_INPUTS else group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=damping,
        descent_rounds=descent_rounds,
        tune_steps=tune_steps,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
    )
    check_new(out)
    source = open_source(model)
    cut = _cut(source, wanted, text, eval_text, num_eval_sequences)
    console = Console()
    if num_eval_sequences and not cut.evaluation:
        console.print("perplexity is not measured: no text is left for it; --eval-text FILE names some")
    before = _perplexity(source, cut, console, "before")
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {"linears": bar.add_task("rounding linears", total=None)}
        if tune_steps:
            tasks["steps"] = bar.add_task("tuning", total=tune_steps)
        written = quantize_checkpoint(
            source,
            cut.calibration,
            out,
            wanted,
            lambda what, done, total: bar.update(tasks[what], completed=done, total=total),
        )
    num_seen = min(num_sequences, len(cut.calibration))
    seen = "" if method == "rtn" else f" on {num_seen} sequences of {sequence_length} tokens"
    tuned = f", tuned in {tune_steps} steps" if tune_steps else ""
    console.print(
        f"{written.num_linears} linears in {written.num_bytes / 2**20:.1f} MiB of weights, by {method}{seen}{tuned}, "
        f"in {time.monotonic() - started:.0f} s: {out}"
    )
    after = _perplexity(open_source(str(out)), cut, console, "after")
    if before is not None and after is not None:
        console.print(f"perplexity {after / before - 1:+.2%}")


def _cut(
    source: Source, wanted: QuantizeOptions, text: Path | None, eval_text: Path | None, num_evaluation: int
) -> CutText:
    from octavo_engine.quant.calibrate.text import CutText, cut_text

    if text is None:
        if wanted.method != "rtn":
            raise InvalidConfig(f"method {wanted.method!r} calibrates on text, none came; give --text FILE")
        if eval_text is None:
            return CutText([], [])
    ids = [
        None if path is None else source.tokenizer().encode(_read(path), add_special_tokens=False)
        for path in (text, eval_text)
    ]
    own, other = ids if ids[0] is not None else (ids[1], ids[1])
    assert own is not None
    return cut_text(
        own,
        num_sequences=len(own) if wanted.tune_steps else wanted.num_sequences,  # tuning takes from all of the text
        length=wanted.sequence_length,
        num_evaluation=num_evaluation,
        evaluation_ids=other,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"{path}: expected a text file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path}: expected UTF-8 text: {error.reason} at byte {error.start}") from error


def _perplexity(source: Source, cut: CutText, console: Console, when: str) -> float | None:
    """Measure and print the perplexity of a model as it is served; None where there is no text for it."""
    from octavo_engine.quant.calibrate.perplexity import perplexity
    from octavo_engine.weights.load import load_model

    if not cut.evaluation:
        return None
    value = perplexity(load_model(source), cut.evaluation)
    num_tokens = len(cut.evaluation) * (len(cut.evaluation[0]) - 1)
    console.print(f"perplexity {when}: {value:.4f} over {num_tokens} tokens")
    return value
