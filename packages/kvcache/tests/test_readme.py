import doctest
import importlib.util
import re
from pathlib import Path

import pytest

from octavo_kvcache import manager

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=["manager", "partial hit", "pin", "window", "host", "storage"])
def test_readme_example_runs(code):
    if "import torch" in code and not all(map(importlib.util.find_spec, ("torch", "octavo_kernels"))):
        pytest.skip("this example needs torch and octavo-kernels")
    exec(compile(code, str(README), "exec"), {})


def test_docstring_example_runs():
    result = doctest.testmod(manager)
    assert (result.failed, result.attempted) == (0, 5)
