"""The directory of a release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtml.checkpoint.inkling.safetensors_file import StoredTensor, read_header
from jaxtml.errors import InputError, join_names

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MTP_WEIGHTS = "mtp.safetensors"  # the released prediction heads' own file
_MTP = "model.mtp."


def model_name(directory: Path) -> str:
    """A model's name; in a hub's cache (`models--ORG--NAME/snapshots/COMMIT`), not the commit."""
    return directory.parent.parent.name.split("--")[-1] if directory.parent.name == "snapshots" else directory.name


def read_json(path: Path) -> dict[str, Any]:
    """Raises `InputError` where it is no file of one JSON object."""
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}: give the directory of an Inkling checkpoint")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name; an index is held to what the files have."""
    index = directory / INDEX
    listed = read_json(index).get("weight_map") if index.is_file() else None
    if index.is_file() and not (
        isinstance(listed, dict) and all(isinstance(name, str) and Path(name).name == name for name in listed.values())
    ):
        raise InputError(f"{index} has no weight_map of tensors to files beside it")
    files = sorted(set(listed.values())) if listed is not None else [WEIGHTS]
    if (directory / MTP_WEIGHTS).is_file() and MTP_WEIGHTS not in files:
        files.append(MTP_WEIGHTS)
    found: dict[str, StoredTensor] = {}
    for name in files:
        if not (directory / name).is_file():
            raise InputError(f"no {name} in {directory}: the checkpoint is incomplete")
        held = read_header(directory / name)
        for tensor in held:
            named = (listed or {}).get(tensor, name)
            if tensor in found or named != name:
                other = found[tensor].file.name if tensor in found else f"where the index names {named}"
                raise InputError(f"{directory} has {tensor} in {name} and {other}: which one is meant?")
        found |= held
    absent = sorted((listed or {}).keys() - found.keys())
    if absent:
        raise InputError(
            f"{directory}: the index names {len(absent)} tensors that no shard holds: {join_names(absent)}"
        )
    return found
