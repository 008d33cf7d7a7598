"""GGUF models in parts: read as one file would be, and what is wrong with a part said plainly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo_engine.errors import CorruptModelFile, ModelNotFound
from octavo_engine.weights.gguf_parts import GGUFParts

MakeGGUF = Callable[..., Path]
MakeParts = Callable[..., list[Path]]
NUM_TENSORS = 11


@pytest.fixture
def make_parts(make_gguf: MakeGGUF) -> MakeParts:
    """Return a function that writes the tiny model in three parts, the second empty; `changes` are keys of parts."""
    names = list(GGUFParts(make_gguf()).tensors)

    def make(changes: Mapping[int, Mapping[str, Any]] | None = None) -> list[Path]:
        paths = []
        for number, part in enumerate((names[:4], [], names[4:])):
            keys = {"split.no": number, "split.count": 3, "split.tensors.count": ("i32", NUM_TENSORS)}
            others = {name: None for name in names if name not in part}
            name = f"tiny-{number + 1:05}-of-00003.gguf"
            paths.append(make_gguf({**keys, **(changes or {}).get(number, {})}, others, name=name))
        return paths

    return make


def test_parts_are_read_as_the_whole_file(make_parts: MakeParts, make_gguf: MakeGGUF) -> None:
    paths = make_parts()
    parts, whole = GGUFParts(paths[0]), GGUFParts(make_gguf())
    assert parts.paths == tuple(paths)
    assert whole.paths[0].name == "tiny.gguf"
    assert list(parts.tensors) == list(whole.tensors)
    assert [info.name for info in parts.in_order] == [info.name for info in whole.in_order]
    for name in whole.tensors:
        assert np.array_equal(parts.raw(name), whole.raw(name)), name


def test_a_model_in_parts_runs_as_the_whole_one(make_parts: MakeParts, make_gguf: MakeGGUF) -> None:
    pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")
    from octavo_engine import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4)
    texts = []
    for path in (make_parts()[0], make_gguf()):
        with LLM(str(path), show_progress=False) as llm:
            texts.append(llm.generate(["hello"], sampling)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]


def test_the_digest_follows_every_part(make_parts: MakeParts) -> None:
    pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")
    from octavo_engine.weights.source import GGUFSource

    before = GGUFSource(make_parts()[0]).digest
    paths = make_parts()
    raw = bytearray(paths[2].read_bytes())
    raw[-1] ^= 1
    paths[2].write_bytes(raw)
    assert GGUFSource(paths[0]).digest != before


def test_another_part_than_the_first_says_which_to_name(make_parts: MakeParts) -> None:
    paths = make_parts()
    with pytest.raises(ModelNotFound, match=r"part 3 of 3; name the first one, tiny-00001-of-00003\.gguf"):
        GGUFParts(paths[2])


def test_a_part_under_another_name_says_how_it_must_be_named(make_parts: MakeParts) -> None:
    path = make_parts()[0]
    with pytest.raises(ModelNotFound, match=r"part 1 of 3; expected a name that ends in -00001-of-00003\.gguf"):
        GGUFParts(path.rename(path.with_name("model.gguf")))


def test_a_missing_part_is_named(make_parts: MakeParts) -> None:
    paths = make_parts()
    paths[1].unlink()
    with pytest.raises(ModelNotFound, match=r"tiny-00002-of-00003\.gguf: no such file; .* is one of 3 parts"):
        GGUFParts(paths[0])


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (0, {"split.count": -1}, r"00001-of-00003.gguf: metadata key 'split.count': expected 0 to 65535, found -1"),
        (0, {"split.count": "3"}, "metadata key 'split.count': expected 0 to 65535, found '3'"),
        (0, {"split.tensors.count": 12}, "'split.tensors.count': expected the 11 tensors of all parts, found 12"),
        (1, {"split.no": 2}, r"00002-of-00003.gguf: metadata keys .* expected 1 and 3, found 2 and 3"),
        (2, {"split.count": 4}, r"00003-of-00003.gguf: metadata keys .* expected 2 and 3, found 2 and 4"),
    ],
    ids=["negative", "text", "tensors", "number", "count"],
)
def test_keys_of_parts_that_contradict_their_files_are_named(
    make_parts: MakeParts, part: int, changes: dict[str, Any], message: str
) -> None:
    kinds = {key: ("i32", value) if isinstance(value, int) else value for key, value in changes.items()}
    with pytest.raises(CorruptModelFile, match=message):
        GGUFParts(make_parts({part: kinds})[0])


def test_a_tensor_of_two_parts_is_named(make_parts: MakeParts, make_gguf: MakeGGUF) -> None:
    paths = make_parts()
    whole = make_gguf({"split.no": 1, "split.count": 3}, name=paths[1].name)
    assert whole == paths[1]
    with pytest.raises(
        CorruptModelFile, match=r"00002-of-00003.gguf: tensor 'token_embd.weight' is also in tiny-00001"
    ):
        GGUFParts(paths[0])
