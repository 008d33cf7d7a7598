"""JSON Schema before it becomes a grammar: unsupported keywords and endless recursion are refused, by their pointer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NoReturn
from urllib.parse import unquote

from octavo_engine.errors import InvalidRequest
from octavo_engine.structured import keywords

MAX_DEPTH = 100
"""How deep schemas may be nested in each other, references not followed."""

MAX_NUM_SCHEMAS = 20_000
"""Subschemas of one schema."""

MAX_NUM_REMAINDERS = 10_000
"""How many remainders of `multipleOf` a grammar may tell apart."""

_MAX_NUM_PASSES = 50  # sound schemas need a few

_SCALARS = frozenset(("string", "number", "integer", "boolean", "null"))
_TYPES = _SCALARS | {"object", "array"}


class SchemaTree:
    """The subschemas that a JSON Schema uses, by their JSON pointers (RFC 6901), from the root on.

    Definitions that nothing refers to are not looked at.

    Raises:
        InvalidRequest: for a keyword that is not supported, a reference to nothing, something that is no schema, or
            recursion that every value would have to follow for ever; names the pointer.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self.nodes: dict[str, Any] = {}
        self._collect()
        self._check_recursion()

    def _collect(self) -> None:
        pending: list[tuple[str, Any, int]] = [("", self.root, 0)]
        while pending:
            pointer, node, depth = pending.pop()
            if pointer in self.nodes:
                continue
            _check_node(pointer, node, depth)
            if len(self.nodes) == MAX_NUM_SCHEMAS:
                refuse(pointer, f"there are more than {MAX_NUM_SCHEMAS} schemas in it; make it smaller")
            self.nodes[pointer] = node
            if isinstance(node, Mapping):
                if "$ref" in node:
                    target = _target_pointer(pointer, node["$ref"])
                    pending.append((target, _resolve(self.root, target, f"{pointer}/$ref"), target.count("/")))
                pending += [(child, value, depth + 1) for child, value in _children(pointer, node)]

    def _check_recursion(self) -> None:
        """Find the least set of schemas that some finite value fits; refuse a schema outside it."""
        finite: set[str] = set()
        in_order = list(reversed(self.nodes))
        for _ in range(_MAX_NUM_PASSES):
            num_known = len(finite)
            for pointer in in_order:
                if pointer not in finite and self._is_finite(pointer, finite):
                    finite.add(pointer)
            if len(finite) == num_known:
                break
        else:
            refuse("", "its references are entangled too deeply; make it simpler")
        for pointer, node in self.nodes.items():
            if pointer not in finite and isinstance(node, Mapping) and "$ref" in node:
                refuse(f"{pointer}/$ref", "recursion without an end: no finite value fits; make a part of it optional")

    def _is_finite(self, pointer: str, finite: set[str]) -> bool:
        node = self.nodes[pointer]
        if not isinstance(node, Mapping) or "const" in node or "enum" in node:
            return True
        if "$ref" in node and _target_pointer(pointer, node["$ref"]) not in finite:
            return False
        if not all(f"{pointer}/allOf/{i}" in finite for i in range(len(node.get("allOf", ())))):
            return False
        for keyword in ("anyOf", "oneOf"):
            options = node.get(keyword, ())
            if options and not any(f"{pointer}/{keyword}/{i}" in finite for i in range(len(options))):
                return False
        return any(self._type_is_finite(pointer, node, kind, finite) for kind in _types_of(node))

    def _type_is_finite(self, pointer: str, node: Mapping[str, Any], kind: str, finite: set[str]) -> bool:
        if kind == "object":
            properties = node.get("properties", {})
            needed = [name for name in node.get("required", ()) if name in properties]
            return all(f"{pointer}/properties/{_escape(name)}" in finite for name in needed)
        if kind == "array":
            num_items, num_prefix = node.get("minItems", 0), len(node.get("prefixItems", ()))
            needed_prefix = all(f"{pointer}/prefixItems/{i}" in finite for i in range(min(num_items, num_prefix)))
            rest_needed = num_items > num_prefix and "items" in node
            return needed_prefix and (not rest_needed or f"{pointer}/items" in finite)
        return True


def refuse(pointer: str, reason: str) -> NoReturn:
    """Raise InvalidRequest for the keyword of a schema that a JSON pointer names."""
    where = pointer if len(pointer) <= 200 else f"{pointer[:200]}..."
    raise InvalidRequest(f"JSON Schema at {where or '/'}: {reason}", param="structured_outputs", code="invalid_schema")


def simplified(node: Any) -> Any:
    """Return a schema without keywords that are unsupported in general but restrict nothing as they are."""
    if isinstance(node, Mapping):
        return {
            key: simplified(value)
            for key, value in node.items()
            if not (key in keywords.HARMLESS and value is keywords.HARMLESS[key])
        }
    return [simplified(value) for value in node] if isinstance(node, list) else node


def rebased(node: Any, home: str) -> Any:
    """Return a schema whose references lead into a copy of it at `home`, a pointer such as "#/$defs/root"."""
    if isinstance(node, Mapping):
        return {
            key: home + value[1:] if key == "$ref" and isinstance(value, str) else rebased(value, home)
            for key, value in node.items()
            if key not in ("$id", "$schema")
        }
    return [rebased(value, home) for value in node] if isinstance(node, list) else node


def _check_node(pointer: str, node: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        refuse(pointer, f"schemas are nested more than {MAX_DEPTH} deep")
    if isinstance(node, bool):
        return
    if not isinstance(node, Mapping):
        refuse(pointer, f"expected a schema, which is an object or a boolean, got {str(node)[:100]!r}")
    for keyword, value in node.items():
        if keyword in keywords.UNSUPPORTED and not (
            keyword in keywords.HARMLESS and value is keywords.HARMLESS[keyword]
        ):
            refuse(
                f"{pointer}/{keyword}",
                f"the keyword {keyword} is not supported; these are: {', '.join(keywords.SUPPORTED)}",
            )
    _check_values(pointer, node)


def _check_values(pointer: str, node: Mapping[str, Any]) -> None:
    """Check the forms that later steps rely on, and those of older drafts that mean something else now."""
    forms: dict[str, tuple[type | tuple[type, ...], str]] = {
        **dict.fromkeys(keywords.SUBSCHEMA_LISTS, (list, "a list of schemas")),
        **dict.fromkeys(keywords.SUBSCHEMA_MAPS, (Mapping, "an object of schemas")),
        "enum": (list, "a list of values"),
        "required": (list, "a list of names"),
        "type": ((str, list), "a type or a list of types"),
        "minItems": (int, "an integer"),
        "exclusiveMinimum": ((int, float), "a number; draft 4's boolean is not supported"),
        "exclusiveMaximum": ((int, float), "a number; draft 4's boolean is not supported"),
        "items": ((bool, Mapping), "a schema; for a list of them use prefixItems"),
        "$ref": (str, "a string"),
    }
    for keyword, (form, expected) in forms.items():
        value = node.get(keyword)
        wrong_bool = isinstance(value, bool) and form is not forms["items"][0]
        if keyword in node and (not isinstance(value, form) or wrong_bool):
            refuse(f"{pointer}/{keyword}", f"expected {expected}, got {str(value)[:100]!r}")
    for keyword in ("required", "type"):
        if isinstance(node.get(keyword), list) and not all(isinstance(name, str) for name in node[keyword]):
            refuse(f"{pointer}/{keyword}", f"expected strings, got {str(node[keyword])[:100]}")
    multiple = node.get("multipleOf")
    if isinstance(multiple, int | float) and not isinstance(multiple, bool):
        _check_multiple(f"{pointer}/multipleOf", multiple)


def _check_multiple(pointer: str, value: float) -> None:
    """Refuse a number with too many remainders: a grammar follows them digit by digit, powers of 10 cost it nothing."""
    num_remainders = abs(Fraction(str(value)).numerator)
    for factor in (2, 5):
        while num_remainders and num_remainders % factor == 0:
            num_remainders //= factor
    if num_remainders > MAX_NUM_REMAINDERS:
        refuse(
            pointer,
            f"{value} has {num_remainders} remainders, its factors 2 and 5 left out; "
            f"at most {MAX_NUM_REMAINDERS} are taken",
        )


def _children(pointer: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in keywords.SUBSCHEMA:
        if keyword in node:
            yield f"{pointer}/{keyword}", node[keyword]
    for keyword in keywords.SUBSCHEMA_LISTS:
        for index, value in enumerate(node.get(keyword, ())):
            yield f"{pointer}/{keyword}/{index}", value
    for keyword in keywords.SUBSCHEMA_MAPS:
        for name, value in node.get(keyword, {}).items():
            yield f"{pointer}/{keyword}/{_escape(name)}", value


def _target_pointer(pointer: str, reference: str) -> str:
    """Return the pointer that a reference names, in one spelling."""
    if reference != "#" and not reference.startswith("#/"):
        refuse(
            f"{pointer}/$ref", f"expected a pointer into this schema, such as '#/$defs/name', got {reference[:100]!r}"
        )
    return unquote(reference[1:])


def _resolve(root: Any, pointer: str, where: str) -> Any:
    node = root
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            refuse(where, f"the reference '#{pointer}' leads to nothing in this schema")
    return node


def _types_of(node: Mapping[str, Any]) -> frozenset[str]:
    kinds = node.get("type")
    if kinds is None:
        return _TYPES
    return frozenset((kinds,) if isinstance(kinds, str) else kinds)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
