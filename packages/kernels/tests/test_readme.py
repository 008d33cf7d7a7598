"""The README's Python blocks run, in order, as one program."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_blocks_of_the_readme_run(monkeypatch, capsys):
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    torch.manual_seed(0)
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "Backend.CPU" in capsys.readouterr().out


def test_the_readme_names_every_exported_function():
    import octavo_kernels as ok

    text = README.read_text(encoding="utf-8")
    functions = [name for name in ok.__all__ if name[0].islower()]
    assert [name for name in functions if name not in text] == []
