"""PeftConfig: what the adapter_config.json of a PEFT folder says of the adapter's matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

from octavo_engine.errors import InvalidAdapter

_REFUSED = (
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings that change what is computed in a way that is not served."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base model's weights, so that the adapter fits the changed ones."""

_EMBEDDING_NAMES = frozenset(("embed_tokens", "model.embed_tokens"))
_HEAD_NAMES = frozenset(("lm_head",))

_BIASES = ("none", "all", "lora_only")
_MAX_PATTERN_LENGTH = 1024


@dataclass(frozen=True)
class PeftConfig:
    """The settings that matter for running an adapter, with PEFT's meaning.

    Attributes:
        where: the file, which errors begin with.
        rank: of matrices that `rank_pattern` does not name.
        alpha: of matrices that `alpha_pattern` does not name; the product is scaled by alpha / rank.
        rank_pattern: ranks by regular expressions for the ends of module names.
        alpha_pattern: likewise.
        use_rslora: whether the product is scaled by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        use_dora: whether each adapted linear has a magnitude (DoRA, arXiv 2402.09353).
        target_modules: what is adapted: ends of names, a regular expression, "all-linear", or None if not said.
        exclude_modules: what is not: names or a regular expression.
        layers: the only layers that are adapted; None for all.
        layers_pattern: names of the list of layers.
        saves_embedding: whether the adapter has an embedding of its own.
        saves_head: likewise a head.
        ties_head: whether PEFT wrote the embedding as the head too, if the base's are one matrix.
    """

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    saves_embedding: bool
    saves_head: bool
    ties_head: bool

    @classmethod
    def parse(cls, settings: Mapping[str, Any], where: str) -> PeftConfig:
        """Read the settings; `where` is the file.

        Raises:
            InvalidAdapter: one is wrong, or asks for what is not served; names it.
        """
        fields = _Fields(settings, where)
        _refuse(fields)
        names, saved = fields.names("target_modules"), fields.saved()
        config = cls(
            where=where,
            rank=fields.number("r", int),
            alpha=fields.number("lora_alpha", float),
            rank_pattern=fields.pattern("rank_pattern", int),
            alpha_pattern=fields.pattern("alpha_pattern", float),
            use_rslora=bool(settings.get("use_rslora", False)),
            use_dora=bool(settings.get("use_dora", False)),
            target_modules=names,
            exclude_modules=fields.names("exclude_modules") or (),
            layers=fields.layers(),
            layers_pattern=_as_tuple(fields.names("layers_pattern")),
            saves_embedding=not saved.isdisjoint(_EMBEDDING_NAMES),
            saves_head=not saved.isdisjoint(_HEAD_NAMES),
            ties_head=bool(settings.get("ensure_weight_tying", False)),
        )
        config._check_expressions()
        return config

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        key = _find(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, module: str) -> float:
        """Return what a module's product is multiplied by."""
        key = _find(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module)
        return alpha / (sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Return whether a linear of the model is adapted, as far as that is said."""
        if self.target_modules is None or _is_excluded(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return _ends_with_any(module, self.target_modules) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        match = self._layer_expression.match(module)
        return match is not None and int(match["layer"]) in self.layers

    @cached_property
    def _layer_expression(self) -> re.Pattern[str]:
        lists = "|".join(self.layers_pattern) or r"[^.]*"
        return re.compile(rf"(?:^|.*?\.)(?:{lists})\.(?P<layer>\d+)\.")

    def _check_expressions(self) -> None:
        """Try the regular expressions, which are compiled where they are used."""
        expressions = [*self.rank_pattern, *self.alpha_pattern, *self.layers_pattern]
        expressions += [names for names in (self.target_modules, self.exclude_modules) if isinstance(names, str)]
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise InvalidAdapter(f"{self.where}: {expression!r} is no regular expression: {error}") from error
            if len(expression) > _MAX_PATTERN_LENGTH:
                raise InvalidAdapter(
                    f"{self.where}: expected regular expressions of at most {_MAX_PATTERN_LENGTH} characters, found "
                    f"one of {len(expression)}; list the modules"
                )


class _Fields:
    """Settings, read with checks of their types."""

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self.settings = settings
        self._where = where

    def wrong(self, name: str, expected: str) -> InvalidAdapter:
        return InvalidAdapter(f"{self._where}: {name}: expected {expected}, found {self.settings.get(name)!r:.80}")

    def number(self, name: str, kind: Callable[[Any], Any]) -> Any:
        return self._positive(name, self.settings.get(name), kind)

    def pattern(self, name: str, kind: Callable[[Any], Any]) -> dict[str, Any]:
        pattern = self.settings.get(name) or {}
        if not isinstance(pattern, Mapping):
            raise self.wrong(name, "an object of numbers by module")
        return {str(key): self._positive(name, value, kind) for key, value in pattern.items()}

    def names(self, name: str) -> str | tuple[str, ...] | None:
        value = self.settings.get(name)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(name, "a list of names, or a regular expression")
        return tuple(value)

    def layers(self) -> frozenset[int] | None:
        value = self.settings.get("layers_to_transform")
        indices = [value] if isinstance(value, int) else value
        if not indices and value != 0:
            return None
        if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            raise self.wrong("layers_to_transform", "a layer or a list of layers")
        return frozenset(indices)

    def saved(self) -> frozenset[str]:
        names = frozenset(_as_tuple(self.names("modules_to_save")))
        if not names <= _EMBEDDING_NAMES | _HEAD_NAMES:
            raise self.wrong("modules_to_save", "embed_tokens and lm_head alone, for others are not served")
        return names

    def _positive(self, name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
        is_number = isinstance(value, int) or (kind is float and isinstance(value, float))
        if isinstance(value, bool) or not is_number or not value > 0:
            raise self.wrong(name, "numbers above 0" if isinstance(self.settings.get(name), Mapping) else "one above 0")
        return kind(value)


def _refuse(fields: _Fields) -> None:
    settings = fields.settings
    if settings.get("peft_type") != "LORA":
        raise fields.wrong("peft_type", "'LORA', the only kind of adapter that is served")
    for name in _REFUSED:
        if settings.get(name):
            raise fields.wrong(name, "it unset, for it is not served yet")
    if settings.get("use_dora") and settings.get("lora_bias"):
        raise fields.wrong("lora_bias", "it unset beside use_dora, for which PEFT has no meaning either")
    if settings.get("bias", "none") not in _BIASES:
        raise fields.wrong("bias", f"one of {', '.join(_BIASES)}")
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise fields.wrong(
            "init_lora_weights",
            "one that leaves the base model as it is; save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion",
        )


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) and names else tuple(names or ())


def _find(pattern: Mapping[str, Any], module: str) -> str | None:
    """Return the first key whose expression ends the module's name."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def _is_excluded(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return _ends_with_any(module, names)


def _ends_with_any(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
