"""Reading PEFT folders: what comes of sound ones, and what is said of the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="adapters are tensors")

from safetensors.torch import load_file, save_file

from octavo_engine.adapters.info import AdapterTarget
from octavo_engine.adapters.peft_config import PeftConfig
from octavo_engine.adapters.read import AdapterReader
from octavo_engine.adapters.weights import AdapterWeights
from octavo_engine.errors import InvalidAdapter

MODULES = [
    f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
]
TARGETS = {name: AdapterTarget(8, 6, has_bias="q_proj" in name) for name in MODULES}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
ADAPTED = [name for name in MODULES if "o_proj" not in name]

Change = Callable[[Path], None]


def write(folder: Path, *, rank: int = 2, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    tensors = {}
    for seed, name in enumerate(ADAPTED):
        generator = torch.Generator().manual_seed(seed)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    return AdapterReader(TARGETS, max_rank=4, dtype=dtype, ends_shape=(12, 8))(str(folder))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_matrices_keep_their_values_and_get_their_scale(tmp_path: Path) -> None:
    weights = read(write(tmp_path / "a"))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sorted(weights.modules) == sorted(ADAPTED)
    assert weights.rank == 2
    for name, (a, b, scale, magnitude) in weights.modules.items():
        assert magnitude is None
        assert torch.equal(a, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(b, tensors[f"base_model.model.{name}.lora_B.weight"])
        assert scale == 2.0
    assert weights.num_bytes == 4 * (2 * 8 + 6 * 2) * 4
    assert read(tmp_path / "a", torch.bfloat16).num_bytes == weights.num_bytes // 2


def test_magnitudes_are_read_by_either_name_that_peft_gave_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", use_dora=True)
    magnitudes = {name: torch.arange(6.0) + seed for seed, name in enumerate(ADAPTED)}
    suffixes = ("", ".weight") * 2
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                f"base_model.model.{name}.lora_magnitude_vector{suffix}": magnitude
                for (name, magnitude), suffix in zip(magnitudes.items(), suffixes, strict=True)
            }
        ),
    )
    weights = read(folder, torch.bfloat16)
    for name, module in weights.modules.items():
        assert module.magnitude is not None
        assert torch.equal(module.magnitude, magnitudes[name])
    assert weights.has_magnitudes
    assert weights.num_bytes == 4 * (2 * (2 * 8 + 6 * 2) + 4 * 6)
    _put(f"{LAST}.lora_magnitude_vector.weight", torch.zeros(5))(folder)
    change_tensors(folder, lambda tensors: tensors.pop(f"{LAST}.lora_magnitude_vector", None))
    with pytest.raises(InvalidAdapter, match=r"magnitude of 'model.layers.1.mlp.up_proj': .* \[6\], found \[5\]"):
        read(folder)
    change_tensors(folder, lambda tensors: tensors.pop(f"{LAST}.lora_magnitude_vector.weight"))
    with pytest.raises(
        InvalidAdapter, match=r"expected lora_magnitude_vector of 'model.layers.1.mlp.up_proj', found none"
    ):
        read(folder)


def test_embeddings_and_heads_stay_as_they_are_stored(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    table = torch.randn(12, 8).bfloat16()
    names = {"embedding": "base_model.model.model.embed_tokens.weight", "head": "base_model.model.lm_head.weight"}
    change_tensors(folder, lambda tensors: tensors.update({name: table + len(name) for name in names.values()}))
    weights = read(folder)
    assert torch.equal(weights.embedding, table + len(names["embedding"]))
    assert torch.equal(weights.head, table + len(names["head"]))
    assert weights.num_bytes - read(write(tmp_path / "b")).num_bytes == 2 * 2 * 12 * 8
    change_tensors(folder, lambda tensors: tensors.update({names["head"]: torch.zeros(11, 8)}))
    with pytest.raises(InvalidAdapter, match=r"head: expected shape \[12, 8\].*found \[11, 8\]; .* merge"):
        read(folder)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digest = read(write(tmp_path / "a")).digest
    assert len(digest) == 32
    assert read(write(tmp_path / "b")).digest == digest
    assert read(write(tmp_path / "c", lora_alpha=5)).digest != digest
    change_tensors(tmp_path / "b", lambda tensors: next(iter(tensors.values())).mul_(1.01))
    assert read(tmp_path / "b").digest != digest


def _drop(kind: str) -> Change:
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors.pop(f"base_model.model.model.layers.1.mlp.up_proj.lora_{kind}.weight")
    )


def _put(name: str, tensor: torch.Tensor) -> Change:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def _spoil(value: float) -> Change:
    return lambda folder: change_tensors(
        folder, lambda tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(value)
    )


def _write_text(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text) and None


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


LAST = "base_model.model.model.layers.1.mlp.up_proj"
DAMAGE: dict[str, tuple[Change, str]] = {
    "no B": (_drop("B"), "expected lora_B of 'model.layers.1.mlp.up_proj', found none"),
    "no A": (_drop("A"), "expected lora_A of 'model.layers.1.mlp.up_proj', found none"),
    "another size": (
        _put(f"{LAST}.lora_A.weight", torch.zeros(2, 9)),
        r"expected shape \[2, 8\].*found \[2, 9\].*another",
    ),
    "another rank": (_put(f"{LAST}.lora_B.weight", torch.zeros(6, 3)), r"expected shape \[6, 2\].*found \[6, 3\]"),
    "one dimension": (_put(f"{LAST}.lora_B.weight", torch.zeros(12)), r"expected shape \[6, 2\].*found \[12\]"),
    "a linear the model lacks": (
        _put("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", torch.zeros(2, 8)),
        "'model.layers.2.mlp.up_proj', which the model does not have; it has 'model.layers.0.self_attn.q_proj'.* and 3",
    ),
    "a head that nothing names": (
        _put("base_model.model.lm_head.weight", torch.zeros(12, 8)),
        "expected no head, which modules_to_save of adapter_config.json does not name; .* merge",
    ),
    "a magnitude without DoRA": (
        _put(f"{LAST}.lora_magnitude_vector", torch.zeros(6)),
        "expected no lora_magnitude_vector of 'model.layers.1.mlp.up_proj': there is one only with use_dora",
    ),
    "a magnitude of a linear the model lacks": (
        _put("base_model.model.model.layers.2.mlp.up_proj.lora_magnitude_vector", torch.zeros(6)),
        "for a linear 'model.layers.2.mlp.up_proj', which the model does not have",
    ),
    "a bias of a linear without": (_put(f"{LAST}.bias", torch.zeros(6)), "which the model lacks"),
    "a bias of another size": (
        _put("base_model.model.model.layers.0.self_attn.q_proj.bias", torch.zeros(5)),
        r"bias of 'model.layers.0.self_attn.q_proj': expected shape \[6\], found \[5\]",
    ),
    "integers": (
        _put(f"{LAST}.lora_A.weight", torch.zeros(2, 8, dtype=torch.int8)),
        "floating dtype, found torch.int8",
    ),
    "NaN": (_spoil(float("nan")), "expected finite numbers, found NaN or infinity"),
    "infinity": (_spoil(float("inf")), "expected finite numbers, found NaN or infinity"),
    "truncated": (_truncate, "save or download the file again"),
    "no tensors": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.clear()),
        "expected lora_A of 'model.layers.0.mlp.up_proj'.* and 1 others, found none",
    ),
    "a pickle": (_pickle, "found adapter_model.bin, which is a pickle"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "safetensors: cannot be read: No such",
    ),
    "no configuration": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "config.json: cannot be read: No such",
    ),
    "no JSON": (_write_text("adapter_config.json", "{"), "expected JSON"),
    "no object": (_write_text("adapter_config.json", "[]"), "expected a JSON object, found list"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_with_what_is_wrong(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(write(tmp_path / "a"))
    with pytest.raises(InvalidAdapter, match=message) as caught:
        read(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert caught.value.code == "invalid_adapter"


SETTINGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type: expected 'LORA'.*found 'IA3'"),
    "dora": (
        {"use_dora": True},
        "expected lora_magnitude_vector of 'model.layers.0.mlp.up_proj', .* found none",
    ),
    "dora with biases of B": (
        {"use_dora": True, "lora_bias": True},
        "lora_bias: expected it unset beside use_dora.*True",
    ),
    "modules_to_save": (
        {"modules_to_save": ["lm_head", "score"]},
        r"modules_to_save: expected embed_tokens and lm_head alone.*\['lm_head', 'score'\]",
    ),
    "no head": ({"modules_to_save": ["lm_head"]}, "expected the head that modules_to_save .* names, found none"),
    "no embedding": ({"modules_to_save": ["model.embed_tokens"]}, "expected the embedding that .* names, found none"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .*path_initial_model_for_weight_conversion"),
    "no rank": ({"r": None}, "r: expected one above 0, found None"),
    "rank 0": ({"r": 0}, "r: expected one above 0, found 0"),
    "a true rank": ({"r": True}, "r: expected one above 0, found True"),
    "a rank of text": ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: expected numbers above 0"),
    "a pattern of text": ({"alpha_pattern": "q"}, "alpha_pattern: expected an object of numbers by module"),
    "bias": ({"bias": "some"}, "bias: expected one of none, all, lora_only, found 'some'"),
    "targets": ({"target_modules": [1]}, "target_modules: expected a list of names, or a regular expression"),
    "regex": ({"target_modules": "("}, r"'\(' is no regular expression"),
    "a long regex": ({"target_modules": "q" * 2000}, "at most 1024 characters, found one of 2000"),
    "layers": ({"layers_to_transform": ["1"]}, "layers_to_transform: expected a layer or a list of layers"),
    "more modules": (
        {"target_modules": "all-linear"},
        "expected lora_A of 'model.layers.0.self_attn.o_proj'.* found none",
    ),
}


@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_settings_that_are_wrong_or_not_served_are_named(tmp_path: Path, case: str) -> None:
    settings, message = SETTINGS_REFUSED[case]
    with pytest.raises(InvalidAdapter, match=message):
        read(write(tmp_path / "a", **settings))


def test_a_rank_over_the_limit_is_refused_with_the_setting_to_raise(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a", rank=4, r=4)).rank == 4
    with pytest.raises(InvalidAdapter, match="has rank 5, at most 4 is served; raise max_lora_rank"):
        read(write(tmp_path / "a", rank=5, r=5))


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="expected the folder of an adapter"):
        read(tmp_path / "nothing")


TARGET_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ends of names": ({"target_modules": ["q_proj", "mlp.up_proj"]}, ADAPTED),
    "not parts of words": ({"target_modules": ["proj"]}, []),
    "a regular expression": ({"target_modules": r"model\.layers\.1\..*_proj"}, MODULES[3:]),
    "all": ({"target_modules": "all-linear"}, MODULES),
    "all but some": ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, ADAPTED),
    "all but an expression": ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, MODULES[3:]),
    "one layer": ({"layers_to_transform": 0}, ADAPTED[:2]),
    "some layers": ({"layers_to_transform": [1, 7], "layers_pattern": "layers"}, ADAPTED[2:]),
    "layers of another list": ({"layers_to_transform": [1], "layers_pattern": ["blocks"]}, []),
    "not said": ({"target_modules": None}, []),
}


@pytest.mark.parametrize("case", TARGET_CASES)
def test_targets_are_those_of_peft(case: str) -> None:
    settings, expected = TARGET_CASES[case]
    config = PeftConfig.parse({**SETTINGS, **settings}, "here")
    assert [name for name in MODULES if config.targets(name)] == expected
