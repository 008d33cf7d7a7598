"""Adapters as the server's operator gives them: those of the start, and the folder that others may come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from octavo_engine.errors import InvalidConfig, InvalidRequest


class AdapterModule(NamedTuple):
    """An adapter that is served from the start: its name, and where it lies."""

    name: str
    path: str


def parse_modules(given: Sequence[str]) -> tuple[AdapterModule, ...]:
    """Read adapters as vLLM's `--lora-modules` takes them: `name=path`, or JSON with `name` and `path`.

    Raises:
        InvalidConfig: one has another form, or two have one name.
    """
    modules = tuple(_parse(text) for text in given)
    names = [module.name for module in modules]
    for name in names:
        if names.count(name) > 1:
            raise InvalidConfig(f"--lora-modules: the name {name!r} comes twice; give each adapter its own")
    return modules


def _parse(text: str) -> AdapterModule:
    if text.startswith("{"):
        try:
            entry = json.loads(text)
        except ValueError:
            entry = None
        match entry:
            case {"name": str(name), "path": str(path)} if name and path:
                return AdapterModule(name, path)
    else:
        name, _, path = text.partition("=")
        if name and path:
            return AdapterModule(name, path)
    raise InvalidConfig(f'--lora-modules takes name=path or {{"name": ..., "path": ...}}, got {text!r:.200}')


def allowed_path(path: str, folder: Path | None) -> str:
    """Return where an adapter lies that a caller of the server names; relative paths begin in the allowed folder.

    Links are followed before it is looked whether the path leads out of the folder.

    Raises:
        InvalidRequest: the path leads out of the folder, or none is allowed.
    """
    if folder is None:
        raise InvalidRequest(
            "this server loads no further adapters; start it with --lora-dir FOLDER to allow those of a folder",
            param="lora_path",
            code="path_not_allowed",
        )
    root = folder.resolve()
    try:
        found = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a name too long, a null byte, a link to itself
        found = root.parent
    if not found.is_relative_to(root):
        raise InvalidRequest(
            "lora_path leads out of the folder that adapters may be loaded from (--lora-dir); give a path inside it",
            param="lora_path",
            code="path_not_allowed",
        )
    return str(found)
