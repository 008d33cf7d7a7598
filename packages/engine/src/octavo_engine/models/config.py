"""ModelConfig: the sizes and constants of a model, read from a Hugging Face config.json or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeGuard

from octavo_engine.errors import CorruptModelFile, UnsupportedModel
from octavo_engine.models.mixtral_defaults import MIXTRAL_DEFAULTS

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]

_HF_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
_UNUSED_ROPE_KEYS = ("mscale", "mscale_all_dim", "truncate")  # they would change the angles, and no llama has them
_DTYPES = ("float32", "float16", "bfloat16")
_ARCHITECTURE_BY_MODEL_TYPE = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}
_MAX_EXPERTS = 4096
_MAX_SIZE = 1 << 31  # of any single count; more is a damaged file

SUPPORTED_ARCHITECTURES: tuple[str, ...] = tuple(_ARCHITECTURE_BY_MODEL_TYPE.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions become rotation angles; the fields that `kind` does not use are None or 1.

    With inv_freq[i] = theta ** (-2 i / head_dim):

    - `default` uses it as it is;
    - `linear` divides it by `factor`;
    - `dynamic` raises theta with the length beyond `max_position_embeddings` (NTK);
    - `llama3` divides long waves by `factor`, keeps short ones and blends between (Llama 3.1);
    - `yarn` blends by wave number and scales cos and sin by `attention_factor` (arXiv 2309.00071);
    - `factors` divides inv_freq[i] by `freq_factors[i]` (GGUF's `rope_freqs.weight`).
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    freq_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of a decoder; free of torch, so that a scheduler or an API process can hold it.

    `architecture` is Hugging Face's class name. `dtype` is the one the weights were published in. `eos_token_ids` and
    `bos_token_ids` are empty if the file names none. `sliding_window` counts tokens, None sees all of them.

    In a mixture of experts `num_experts` feed-forward blocks of `intermediate_size` stand side by side in each layer,
    of which `num_experts_per_token` serve a token; both are 0 elsewhere. `own_experts` are those whose weights this
    process has, None all of them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    sliding_window: int | None
    bos_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    dtype: str
    hidden_act: str
    num_experts: int = 0
    num_experts_per_token: int = 0
    own_experts: range | None = None

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str) -> ModelConfig:
        """Read the contents of a Hugging Face config.json, of Transformers 5 or older.

        Args:
            values: The parsed JSON object; not modified.
            where: The file's name, for error messages.

        Raises:
            UnsupportedModel: if the architecture, the activation or the kind of RoPE is none that we run.
            CorruptModelFile: if a value is missing, of the wrong type, out of range, or contradicts another one.
        """
        architecture = _hf_architecture(values, where)
        is_mixture = architecture == "MixtralForCausalLM"
        if is_mixture:
            values = {**MIXTRAL_DEFAULTS, **values}
        fields = _Fields(values, where)
        hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        return cls._checked(
            where,
            architecture=architecture,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.size("num_key_value_heads", num_heads),
            head_dim=fields.head_dim("head_dim", hidden_size, num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_hf_rope(values, where),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            max_position_embeddings=fields.size("max_position_embeddings", 2048),
            sliding_window=fields.optional_size("sliding_window"),
            bos_token_ids=token_ids(values.get("bos_token_id"), f"{where}: bos_token_id"),
            eos_token_ids=token_ids(values.get("eos_token_id"), f"{where}: eos_token_id"),
            dtype=_hf_dtype(values, where),
            hidden_act=fields.text("hidden_act", "silu"),
            num_experts=fields.size("num_local_experts") if is_mixture else 0,
            num_experts_per_token=fields.size("num_experts_per_tok") if is_mixture else 0,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensor_names: Iterable[str],
        where: str,
        *,
        vocab_size: int,
        freq_factors: tuple[float, ...] | None = None,
    ) -> ModelConfig:
        """Read the metadata of a GGUF file.

        Args:
            metadata: The file's keys; not modified.
            tensor_names: The names of its tensors; they tell whether embeddings are tied and projections have biases.
            where: The file's name, for error messages.
            vocab_size: The number of rows of the embedding.
            freq_factors: [head_dim / 2], the values of the tensor `rope_freqs.weight` if the file has one.

        Raises:
            UnsupportedModel: if the architecture or the kind of RoPE is none that we run.
            CorruptModelFile: if a value is missing, of the wrong type, out of range, or contradicts another one.
        """
        names = frozenset(tensor_names)
        architecture = _Fields(metadata, where).text("general.architecture")
        if architecture != "llama":
            raise UnsupportedModel(f"{where}: architecture {architecture!r} is not supported; of GGUF files, llama is")
        fields = _Fields(metadata, where, "llama.")
        num_experts = fields.size("expert_count") if fields.get("expert_count") else 0
        hidden_size, num_heads = fields.size("embedding_length"), fields.size("attention.head_count")
        head_dim = fields.head_dim("attention.key_length", hidden_size, num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found_dim := fields.size(key, head_dim)) != head_dim:
                raise UnsupportedModel(f"{where}: llama.{key} {found_dim} differs from the head dimension {head_dim}")
        return cls._checked(
            where,
            architecture="MixtralForCausalLM" if num_experts else "LlamaForCausalLM",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.size("feed_forward_length"),
            num_layers=fields.size("block_count"),
            num_heads=num_heads,
            num_kv_heads=fields.size("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope=_gguf_rope(fields, freq_factors),
            tie_word_embeddings="output.weight" not in names,
            attention_bias="blk.0.attn_q.bias" in names,
            mlp_bias="blk.0.ffn_gate.bias" in names,
            max_position_embeddings=fields.size("context_length"),
            sliding_window=fields.optional_size("attention.sliding_window"),
            bos_token_ids=token_ids(metadata.get("tokenizer.ggml.bos_token_id"), f"{where}: bos_token_id"),
            eos_token_ids=_gguf_eos_ids(metadata, where),
            dtype="float32",
            hidden_act="silu",
            num_experts=num_experts,
            num_experts_per_token=fields.size("expert_used_count") if num_experts else 0,
        )

    @classmethod
    def _checked(cls, where: str, **values: Any) -> ModelConfig:
        config = cls(**values)
        if config.num_heads % config.num_kv_heads:
            _corrupt(f"{where}: expected heads a multiple of KV heads, found {config.num_heads}/{config.num_kv_heads}")
        if config.head_dim % 2:
            _corrupt(f"{where}: expected an even head dimension, found {config.head_dim}")
        used, num_experts = config.num_experts_per_token, config.num_experts
        if not used <= num_experts <= _MAX_EXPERTS:
            _corrupt(
                f"{where}: expected up to {_MAX_EXPERTS} experts, each token with some, found {used} of {num_experts}"
            )
        if config.hidden_act not in ("silu", "swish"):
            raise UnsupportedModel(f"{where}: hidden_act {config.hidden_act!r} is not supported; silu is")
        for token_id in config.bos_token_ids + config.eos_token_ids:
            if token_id >= config.vocab_size:
                _corrupt(f"{where}: expected token ids below vocab_size {config.vocab_size}, found {token_id}")
        factors = config.rope.freq_factors
        if factors is not None and len(factors) != config.head_dim // 2:
            _corrupt(f"{where}: expected {config.head_dim // 2} rope frequency factors, found {len(factors)}")
        return config


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """Read a token id, a list of them, or None, as configuration files have it.

    Raises:
        CorruptModelFile: if it is something else; the message begins with `what`.
    """
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    for token_id in ids:
        if not _is_int(token_id) or not 0 <= token_id < _MAX_SIZE:
            _corrupt(f"{what}: expected a token id or a list of them, found {value!r}")
    return ids


class _Fields:
    """Values by key, each checked for type and range; errors name the key with its prefix."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self._values = values
        self._where = where
        self._prefix = prefix

    def get(self, key: str) -> Any:
        return self._values.get(self._prefix + key)

    def fail(self, key: str, expected: str, found: Any) -> NoReturn:
        what = "nothing" if found is None else repr(found)
        _corrupt(f"{self._where}: {self._prefix}{key}: expected {expected}, found {what}")

    def unsupported(self, key: str, found: Any, supported: str) -> NoReturn:
        raise UnsupportedModel(f"{self._where}: {self._prefix}{key} {found!r} is not supported; {supported}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, str):
            self.fail(key, "a string", value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if not _is_int(value) or not 1 <= value < _MAX_SIZE:
            self.fail(key, f"an integer from 1 to {_MAX_SIZE - 1}", value)
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self.get(key) is None else self.size(key)

    def head_dim(self, key: str, hidden_size: int, num_heads: int) -> int:
        if self.get(key) is not None:
            return self.size(key)
        if hidden_size % num_heads:
            _corrupt(f"{self._where}: expected a hidden size that divides by {num_heads} heads, found {hidden_size}")
        return hidden_size // num_heads

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.fail(key, "a positive number", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false", value)
        return bool(value)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _corrupt(message: str) -> NoReturn:
    raise CorruptModelFile(message)


def _hf_architecture(values: Mapping[str, Any], where: str) -> str:
    listed = values.get("architectures") or [_ARCHITECTURE_BY_MODEL_TYPE.get(str(values.get("model_type")))]
    found = listed[0] if isinstance(listed, list) and listed else None
    if found in SUPPORTED_ARCHITECTURES:
        return str(found)
    name = found or values.get("model_type")
    raise UnsupportedModel(
        f"{where}: architecture {name!r} is not supported; these are: {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _hf_dtype(values: Mapping[str, Any], where: str) -> str:
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"  # torch_dtype before Transformers 5
    if dtype not in _DTYPES:
        raise UnsupportedModel(f"{where}: dtype {dtype!r} is not supported; these are: {', '.join(_DTYPES)}")
    return str(dtype)


def _hf_rope(values: Mapping[str, Any], where: str) -> RopeConfig:
    """Read `rope_parameters` (Transformers 5) or `rope_theta` with `rope_scaling` (older)."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        _corrupt(f"{where}: expected rope parameters as an object, found {parameters!r}")
    fields = _Fields({"rope_theta": values.get("rope_theta"), **parameters}, where)
    kind = _hf_rope_kind(fields)
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        fields.unsupported("partial_rotary_factor", fields.get("partial_rotary_factor"), "1.0 is")
    for key in _UNUSED_ROPE_KEYS:
        if fields.get(key) is not None:
            fields.unsupported(key, fields.get(key), "RoPE parameters without it are")
    original = fields.optional_size("original_max_position_embeddings")
    if kind == "yarn" and original is None:
        original = _Fields(values, where).size("max_position_embeddings", 2048)
    rope = RopeConfig(
        kind=kind,
        theta=fields.number("rope_theta", 10000.0),
        factor=1.0 if kind == "default" else fields.number("factor"),
        low_freq_factor=fields.optional_number("low_freq_factor"),
        high_freq_factor=fields.optional_number("high_freq_factor"),
        original_max_position_embeddings=original,
        attention_factor=fields.optional_number("attention_factor"),
        beta_fast=fields.optional_number("beta_fast"),
        beta_slow=fields.optional_number("beta_slow"),
    )
    if kind == "llama3":
        _check_llama3(rope, fields)
    return rope


def _hf_rope_kind(fields: _Fields) -> RopeKind:
    found = fields.text("rope_type", fields.text("type", "default"))
    for kind in _HF_ROPE_KINDS:
        if kind == found:
            return kind
    return fields.unsupported("rope_type", found, f"these are: {', '.join(_HF_ROPE_KINDS)}")


def _check_llama3(rope: RopeConfig, fields: _Fields) -> None:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        fields.fail("low_freq_factor", f"a number below high_freq_factor {high:g}", low)
    if rope.original_max_position_embeddings is None:
        fields.fail("original_max_position_embeddings", "the length before scaling", None)


def _gguf_rope(fields: _Fields, freq_factors: tuple[float, ...] | None) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    kind = fields.text("rope.scaling.type", "none")
    if freq_factors is not None:
        if any(not 0 < factor < math.inf for factor in freq_factors):
            fields.fail("rope_freqs.weight", "positive numbers", freq_factors)
        if kind != "none":
            fields.unsupported("rope.scaling.type", kind, "with rope_freqs.weight, none is")
        return RopeConfig(kind="factors", theta=theta, freq_factors=freq_factors)
    if kind == "none":
        factor = fields.number("rope.scale_linear", 1.0)  # how linear scaling was written before it had a type
        return RopeConfig(theta=theta) if factor == 1.0 else RopeConfig(kind="linear", theta=theta, factor=factor)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=fields.number("rope.scaling.factor"))
    if kind == "yarn":
        return _gguf_yarn(fields, theta)
    return fields.unsupported("rope.scaling.type", kind, "none, linear and yarn are")


def _gguf_yarn(fields: _Fields, theta: float) -> RopeConfig:
    if fields.number("rope.scaling.attn_factor", 1.0) != 1.0:
        fields.unsupported("rope.scaling.attn_factor", fields.get("rope.scaling.attn_factor"), "1.0 is")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=fields.number("rope.scaling.factor"),
        original_max_position_embeddings=fields.size("rope.scaling.original_context_length"),
        beta_fast=fields.optional_number("rope.scaling.yarn_beta_fast"),
        beta_slow=fields.optional_number("rope.scaling.yarn_beta_slow"),
    )


def _gguf_eos_ids(metadata: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Collect the ids that end a turn: end of sequence, of turn, of message."""
    found: dict[int, None] = {}
    for name in ("eos", "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        found.update(dict.fromkeys(token_ids(metadata.get(key), f"{where}: {key}")))
    return tuple(found)
