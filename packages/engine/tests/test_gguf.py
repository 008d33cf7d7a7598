"""The GGUF container: what a sound file says, and that no damage gets past it untyped or unbounded."""

import random
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from octavo_engine.errors import CorruptModelFile, EngineError, ModelNotFound, UnsupportedModel
from octavo_engine.weights.gguf import GGUFFile, TensorInfo, TensorType
from octavo_engine.weights.source import GGUFSource
from octavo_engine.weights.stored import StoredTensor

MakeGGUF = Callable[..., Path]
FINITE = 0xBB
"""What random bytes are masked with so that no number among them is NaN or infinite, wherever it lies."""


@pytest.fixture
def tiny(make_gguf: MakeGGUF) -> Path:
    return make_gguf()


def test_metadata_comes_in_python_types(make_gguf: MakeGGUF) -> None:
    file = GGUFFile(make_gguf({"a.u64": ("u64", 1 << 40), "a.flag": True, "a.list": ["x", "", "é"]}))
    assert file.metadata["a.u64"] == 1 << 40
    assert file.metadata["a.flag"] is True
    assert file.metadata["a.list"] == ["x", "", "é"]
    assert file.metadata["llama.rope.freq_base"] == 10000.0
    assert file.metadata["tokenizer.ggml.token_type"][:4].tolist() == [3, 3, 3, 1]


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(make_gguf: MakeGGUF, version: int) -> None:
    assert GGUFFile(make_gguf(version=version)).version == version


def test_tensor_shapes_have_the_slowest_dimension_first(tiny: Path) -> None:
    info = GGUFFile(tiny).tensors["blk.0.ffn_gate.weight"]
    assert info == TensorInfo("blk.0.ffn_gate.weight", (96, 64), TensorType.Q4_1, info.offset, 96 * 2 * 20)


def test_alignment_of_the_file_is_followed(make_gguf: MakeGGUF) -> None:
    path = make_gguf({"general.alignment": 256}, alignment=256)
    file = GGUFFile(path)
    assert all(info.offset % 256 == 0 for info in file.tensors.values())
    assert np.array_equal(file.raw("output_norm.weight"), GGUFFile(make_gguf(name="b.gguf")).raw("output_norm.weight"))


def test_header_equals_the_gguf_package(tiny: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    reader, file = gguf.GGUFReader(tiny), GGUFFile(tiny)
    assert [(t.name, t.data_offset, t.n_bytes) for t in reader.tensors] == [
        (t.name, t.offset, t.num_bytes) for t in file.tensors.values()
    ]
    for key, value in file.metadata.items():
        expected = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key


@pytest.mark.model
def test_header_of_the_demo_model_is_read_in_a_moment(demo_path: Path) -> None:
    # About 0.04 s of CPU time; the gguf package needs fifty times as long.
    assert min(_cpu_seconds(lambda: GGUFFile(demo_path)) for _ in range(5)) < 0.25


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def test_missing_file_is_model_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.gguf: no such file"):
        GGUFFile(tmp_path / "none.gguf")


def _patched(path: Path, at: int, data: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("at", "data", "error", "message"),
    [
        (0, b"GGML", CorruptModelFile, r"expected the magic number b'GGUF', found b'GGML'"),
        (4, struct.pack("<I", 1), UnsupportedModel, "version 1; versions 2 and 3"),
        (4, struct.pack(">I", 3), UnsupportedModel, "version 3 in big-endian order"),
        (8, struct.pack("<Q", 1 << 60), CorruptModelFile, f"expected {1 << 60} tensors, found"),
        (16, struct.pack("<Q", 1 << 60), CorruptModelFile, f"expected {1 << 60} metadata keys, found"),
        (24, struct.pack("<Q", 1 << 62), CorruptModelFile, "metadata key 0 at byte 32: expected at most 65535 bytes"),
        (32, b"\xff", CorruptModelFile, "metadata key 0 at byte 32: expected UTF-8"),
        (52, struct.pack("<I", 77), CorruptModelFile, "'general.architecture': expected a value type from 0 to 12"),
    ],
    ids=["magic", "version", "endian", "num-tensors", "num-keys", "key-length", "key-utf8", "value-type"],
)
def test_damage_at_the_start_is_named(tiny: Path, at: int, data: bytes, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        GGUFFile(_patched(tiny, at, data))


def _tensor_field(path: Path, name: str, skip: int) -> int:
    """Return the position `skip` bytes after a tensor's name in the header."""
    return path.read_bytes().index(name.encode()) + len(name) + skip


@pytest.mark.parametrize(
    ("skip", "data", "error", "message"),
    [
        (0, struct.pack("<I", 9), CorruptModelFile, "expected 1 to 4 dimensions, found 9"),
        (4, struct.pack("<Q", 1 << 61), CorruptModelFile, r"shape \[64, 2305843009213693952\]: expected"),
        (4, struct.pack("<Q", 0), CorruptModelFile, "expected dimensions of at least 1"),
        (4, struct.pack("<Q", 33), CorruptModelFile, "expected Q4_1 rows of a multiple of 32, found 33"),
        (20, struct.pack("<I", 12), CorruptModelFile, "expected Q4_K rows of a multiple of 256, found 64"),
        (20, struct.pack("<I", 9), UnsupportedModel, "has type Q8_1, which is none of the 32 that are read"),
        (20, struct.pack("<I", 99), UnsupportedModel, "has type number 99"),
        (24, struct.pack("<Q", 1 << 40), CorruptModelFile, r"Q4_1 and shape \[64, 64\]: expected 2560 bytes from byte"),
        (24, struct.pack("<Q", 5), CorruptModelFile, "expected an offset that is a multiple of 32, found 5"),
        (24, struct.pack("<Q", 0), CorruptModelFile, "expected to begin at byte"),
    ],
    ids=[
        *("dims", "huge", "zero", "row", "long-block"),
        *("known-type", "unknown-type", "outside", "misaligned", "overlap"),
    ],
)
def test_damage_in_a_tensor_entry_names_the_tensor(
    tiny: Path, skip: int, data: bytes, error: type, message: str
) -> None:
    _patched(tiny, _tensor_field(tiny, "blk.0.attn_q.weight", skip), data)
    with pytest.raises(error, match=message) as caught:
        GGUFFile(tiny)
    assert "tensor 'blk.0.attn_q.weight'" in str(caught.value)
    assert str(tiny) in str(caught.value)


def test_array_longer_than_the_file_is_refused_before_it_is_read(tiny: Path) -> None:
    _patched(tiny, _tensor_field(tiny, "tokenizer.ggml.token_type", 8), struct.pack("<Q", 1 << 58))
    with pytest.raises(CorruptModelFile, match=r"'tokenizer.ggml.token_type' at byte \d+: expected \d+ bytes, found"):
        GGUFFile(tiny)


def test_truncated_data_names_the_tensor(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-100])
    with pytest.raises(CorruptModelFile, match=r"tensor 'output_norm.weight'.* expected 256 bytes from byte"):
        GGUFFile(tiny)


def test_empty_file_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CorruptModelFile, match="found an empty file"):
        GGUFFile(tmp_path / "x.gguf")


def _open_all(path: Path) -> None:
    source = GGUFSource(path)
    source.tokenizer().encode("hello world 123")
    source.chat_template()
    for _, tensor in source.weights():
        if isinstance(tensor, StoredTensor):
            tensor.values()


def _mutated(raw: bytes, header_bytes: int, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return raw[: rng.randrange(len(raw))]
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(header_bytes)] = rng.choice((0, 1, 8, 9, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _of_later_types(make_gguf: MakeGGUF) -> Path:
    """Write the tiny model with a part's keys and with types of blocks of 256, of tables and of whole numbers."""
    rng = np.random.default_rng(0)

    def tensor(tensor_type: TensorType, rows: int, columns: int) -> tuple[int, np.ndarray]:
        row_bytes = columns // tensor_type.block_elements * tensor_type.block_bytes
        return int(tensor_type), rng.integers(0, 256, (rows, row_bytes), dtype=np.uint8) & FINITE

    tensors = {
        "blk.0.attn_q.weight": tensor(TensorType.Q5_1, 64, 64),
        "blk.0.attn_k.weight": tensor(TensorType.MXFP4, 32, 64),
        "blk.0.attn_v.weight": tensor(TensorType.NVFP4, 32, 64),
        "blk.0.attn_output.weight": tensor(TensorType.I16, 64, 64),
        "blk.0.ffn_gate.weight": tensor(TensorType.IQ4_NL, 256, 64),
        "blk.0.ffn_up.weight": tensor(TensorType.Q5_0, 256, 64),
        "blk.0.ffn_down.weight": tensor(TensorType.Q4_K, 64, 256),
    }
    keys = {"llama.feed_forward_length": 256, "split.no": 0, "split.count": 1, "split.tensors.count": ("i32", 11)}
    return make_gguf(keys, tensors)


def _of_grids(make_gguf: MakeGGUF) -> Path:
    """Write the tiny model, wider, with types of grids, of digits and of 8 bits."""
    rng = np.random.default_rng(0)
    types = (TensorType.IQ1_S, TensorType.IQ1_M, TensorType.IQ2_XXS, TensorType.IQ2_XS, TensorType.IQ3_XXS)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    rows = (256, 32, 32, 256, 256, 256, 256)
    tensors: dict[str, tuple[int, np.ndarray]] = {}
    for name, count, tensor_type in zip(names, rows, (*types, TensorType.TQ1_0, TensorType.Q8_K), strict=True):
        stored = rng.integers(0, 256, (count, tensor_type.block_bytes), dtype=np.uint8) & FINITE
        tensors[f"blk.0.{name}.weight"] = (int(tensor_type), stored)
    embedding = rng.integers(0, 256, (273, TensorType.IQ3_S.block_bytes), dtype=np.uint8) & FINITE
    norm = (int(TensorType.F32), np.ones(256, np.float32).view(np.uint8))
    tensors |= {"token_embd.weight": (int(TensorType.IQ3_S), embedding)}
    tensors |= dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"), norm)
    sizes = {"embedding_length": 256, "feed_forward_length": 256, "attention.head_count": 8}
    return make_gguf({f"llama.{key}": size for key, size in sizes.items()}, tensors)


FILES = {
    "first types": lambda make_gguf: make_gguf(),
    "later types": _of_later_types,
    "types of grids": _of_grids,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_damaged_files_end_in_typed_errors_with_bounded_memory(
    make_gguf: MakeGGUF, seed: int, write: Callable[[MakeGGUF], Path]
) -> None:
    pytest.importorskip("torch", reason="weights are read with the extra octavo-engine[local]")
    tiny = write(make_gguf)
    raw, rng = tiny.read_bytes(), random.Random(seed)
    header_bytes = GGUFFile(tiny).header_bytes
    _open_all(tiny)
    messages = []
    tracemalloc.start()
    try:
        for _ in range(150):
            tiny.write_bytes(_mutated(raw, header_bytes, rng))
            try:
                _open_all(tiny)
            except EngineError as error:
                messages.append(str(error))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert len(messages) > 50
    assert [text for text in messages if str(tiny) not in text and "chat template" not in text] == []


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_files_with_damaged_data_are_refused_or_mean_numbers(
    make_gguf: MakeGGUF, write: Callable[[MakeGGUF], Path]
) -> None:
    pytest.importorskip("torch", reason="weights are read with the extra octavo-engine[local]")
    tiny = write(make_gguf)
    raw, rng = tiny.read_bytes(), random.Random(0)
    data_start = min(info.offset for info in GGUFFile(tiny).tensors.values())
    messages = []
    for _ in range(60):
        changed = bytearray(raw)
        for _ in range(rng.choice((2, 8, 32))):
            changed[rng.randrange(data_start, len(raw))] |= rng.choice((0x04, 0x40, 0x7F, 0xFC, 0xFF))
        tiny.write_bytes(changed)
        try:
            stored = [weight for _, weight in GGUFSource(tiny).weights() if isinstance(weight, StoredTensor)]
            values = [tensor.values() for tensor in stored]
        except CorruptModelFile as error:
            messages.append(str(error))
        else:
            assert not any(bool(found.isnan().any()) for found in values)
    assert 0 < len(messages) < 60
    expected = re.compile(f"{re.escape(str(tiny))}: tensor '[a-z_.0]+' of type [A-Z0-9_]+: expected finite scales")
    assert [text for text in messages if not expected.match(text)] == []
