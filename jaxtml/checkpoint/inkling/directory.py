"""The directory of a released checkpoint: its JSON files, and the tensors in its shards.

A release is one `model.safetensors`, or several shards and an index that says which shard has which tensor. The
prediction heads may stand in a file of their own. Called by the source and the sink beside this module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtml.checkpoint.inkling.safetensors_file import StoredTensor, read_header
from jaxtml.errors import InputError, join_names

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MTP_WEIGHTS = "mtp.safetensors"  # the file of the prediction heads, if they are in a file of their own
MTP_PREFIX = "model.mtp."  # the beginning of the names of the prediction heads' tensors


def model_name(directory: Path) -> str:
    """Returns the name of the model in a directory: the directory's name.

    In the cache of a model hub (`models--ORG--NAME/snapshots/COMMIT`), the name is NAME and not the commit.
    """
    return directory.parent.parent.name.split("--")[-1] if directory.parent.name == "snapshots" else directory.name


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      InputError: the file is missing, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}: give the directory of an Inkling checkpoint")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, copy it again: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: copy it again")
    return value


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a release by its name, with its place in a file.

    Raises:
      InputError: a file is missing or damaged, a tensor is there twice, or the index does not match the shards.
    """
    index = directory / INDEX
    weight_map = _read_index(index) if index.is_file() else {}
    files = sorted(set(weight_map.values())) if index.is_file() else [WEIGHTS]
    if (directory / MTP_WEIGHTS).is_file() and MTP_WEIGHTS not in files:
        files.append(MTP_WEIGHTS)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not (directory / file).is_file():
            raise InputError(f"no {file} in {directory}: the checkpoint is incomplete, download it again")
        tensors = read_header(directory / file)
        for name in tensors:
            if name in stored:
                raise InputError(
                    f"{directory} has {name} in {file} and in {stored[name].file.name}: remove one of them"
                )
            file_in_index = weight_map.get(name, file)
            if file_in_index != file:
                raise InputError(
                    f"{directory} has {name} in {file}, but its index says {file_in_index}: download it again"
                )
        stored |= tensors
    absent = sorted(weight_map.keys() - stored.keys())
    if absent:
        raise InputError(
            f"{directory}: {len(absent)} tensors of the index are in no shard, download it again: {join_names(absent)}"
        )
    return stored


def _read_index(index: Path) -> dict[str, str]:
    """Returns the file of each tensor by the tensor's name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise InputError(f"{index} has no weight_map from tensors to files beside it: download it again")
    return weight_map
