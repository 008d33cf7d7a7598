"""`octavo quantize` on a tiny random model."""

import json
import re

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")
transformers = pytest.importorskip("transformers", reason="Transformers makes the model")

from typer.testing import CliRunner

from octavo_engine.quant.calibrate.text import cut_text
from octavo_engine.weights.source import FolderSource
from octavo_server.cli import app

TEXT = " ".join(f"{word} {number}" for number in range(120) for word in ("alpha", "beta", "gamma"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, bos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def quantize(tmp_path):
    """Run the command on a text; returns the result and the folder it was to write."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*arguments, text=True):
        out = tmp_path / "out"
        given = ["--text", str(tmp_path / "text.txt")] if text else []
        arguments = ["quantize", "--sequence-length", "32", *map(str, arguments), "--out", str(out), *given]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"}), out

    return run


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_a_checkpoint_is_written_and_weighed(quantize, model_folder, method):
    result, out = quantize(model_folder, "--method", method, "--group-size", 16)
    assert result.exit_code == 0, result.output
    before, after = (float(re.search(rf"perplexity {when}: ([\d.]+) over", result.stdout)[1]) for when in WHEN)
    change = float(re.search(r"perplexity ([+-][\d.]+)%", result.stdout)[1])
    assert change == pytest.approx(100 * (after / before - 1), abs=0.01)
    seen = "" if method == "rtn" else " on 64 sequences of 32 tokens"
    assert f"7 linears in 0.0 MiB of weights, by {method}{seen}, in " in result.stdout
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == ("awq" if method == "awq" else "gptq")
    assert settings["group_size"] == 16
    assert FolderSource(out).scheme is not None


def test_tuning_is_by_sequences_beyond_those_that_linears_are_rounded_by(quantize, model_folder, monkeypatch):
    from octavo_engine.quant.calibrate import tune

    seen = []
    init = tune.Tuner.__init__
    monkeypatch.setattr(
        tune.Tuner, "__init__", lambda self, *given: (seen.append(len(given[3])), init(self, *given))[1]
    )
    result, out = quantize(model_folder, "--tune-steps", 3, "--num-sequences", 5, "--num-eval-sequences", 2)
    num_pieces = len(TEXT.encode()) // 32
    assert result.exit_code == 0, result.output
    assert seen == [num_pieces - 2]
    assert "by gptq on 5 sequences of 32 tokens, tuned in 3 steps, in " in result.stdout
    assert json.loads((out / "config.json").read_text())["quantization_config"]["meta"]["tune_steps"] == 3


WHEN = ("before", "after")


def test_weighing_can_be_left_out(quantize, model_folder):
    result, _ = quantize(model_folder, "--method", "rtn", "--num-eval-sequences", 0)
    assert result.exit_code == 0
    assert "perplexity" not in result.stdout


def test_a_folder_with_something_in_it_is_refused_before_anything_is_measured(quantize, model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result, out = quantize(model_folder, "--method", "rtn")
    assert result.exit_code == 2
    assert f"error: {out}: expected a new or an empty folder" in result.stderr
    assert "perplexity" not in result.stdout


def test_sequences_longer_than_the_model_takes_are_refused(quantize, model_folder):
    result, out = quantize(model_folder, "--sequence-length", 65)
    assert result.exit_code == 2
    assert "error: sequences of 65 tokens came, the model takes 64 at most" in result.stderr
    assert not out.exists()


def test_without_text_nothing_is_weighed_and_the_command_says_so(quantize, model_folder):
    result, out = quantize(model_folder, "--method", "rtn", "--group-size", "-1", text=False)
    assert result.exit_code == 0
    assert "perplexity is not measured: no text is left for it" in result.stdout
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "best"), "method 'best' is not one of gptq, awq, rtn"),
        (("--text", "/nowhere/text.txt"), "/nowhere/text.txt: expected a text file: No such file"),
        (("--method", "rtn", "--tune-steps", 2), "tune_steps go with method 'gptq', got 'rtn'; leave them out"),
        ((), "method 'gptq' calibrates on text, none came; give --text FILE"),
    ],
    ids=["method", "file", "tuning", "no text"],
)
def test_mistakes_are_one_line(quantize, model_folder, arguments, message):
    result, out = quantize(model_folder, *arguments, text=False)
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr
    assert not out.exists()


def test_calibration_is_from_all_over_the_text_and_shares_nothing_with_what_it_is_weighed_by():
    cut = cut_text(range(100), num_sequences=3, length=10, num_evaluation=5)
    assert [ids[0] for ids in cut.calibration] == [0, 20, 50]
    assert [ids[0] for ids in cut.evaluation] == [80, 90]
    other = cut_text(range(25), num_sequences=9, length=10, num_evaluation=1, evaluation_ids=range(500, 540))
    assert other.calibration == [list(range(10)), list(range(10, 20))]
    assert other.evaluation == [list(range(500, 510))]
