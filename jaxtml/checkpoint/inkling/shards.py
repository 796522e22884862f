"""The safetensors files of a release, and which of them has which tensor.

A release is one `model.safetensors`, or several shards and an index that says which shard has which tensor. The
prediction heads may stand in a file of their own, which the index need not name. Every other difference between the
index and the files is refused, except a wrong total size: this only causes a warning. Called by the source beside this
module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jaxtml.checkpoint.contents import adapter_files, unfinished_downloads
from jaxtml.checkpoint.inkling.config_section import short_repr
from jaxtml.checkpoint.inkling.directory import INDEX, MTP_WEIGHTS, WEIGHTS, read_json
from jaxtml.checkpoint.inkling.safetensors_file import StoredTensor, read_header
from jaxtml.errors import InputError, join_names

_FILE_NAME = re.compile(r"[^/\0]{1,200}\.safetensors")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d{1,5})\.safetensors")


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a release by its name, with its place in a file.

    Raises:
      InputError: a file is missing, damaged or not in the index, a tensor is there twice, or the index does not match
        the shards.
    """
    index = read_json(directory / INDEX) if (directory / INDEX).is_file() else None
    weight_map = {} if index is None else _weight_map(directory / INDEX, index)
    files = sorted(set(weight_map.values()))
    if index is None:
        _check_single_file(directory)
        files = [WEIGHTS]
    else:
        _check_shards(directory, files)
    if (directory / MTP_WEIGHTS).is_file() and MTP_WEIGHTS not in files:
        files.append(MTP_WEIGHTS)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= _read_shard(directory, file, weight_map, stored)
    absent = sorted(weight_map.keys() - stored.keys())
    if absent:
        raise InputError(
            f"{directory}: {len(absent)} tensors of the index are in no shard, download it again: {join_names(absent)}"
        )
    if index is not None:
        # The total size in an index is the size of the tensors that the index names, without any other tensors.
        _check_total_size(directory, index, sum(stored[name].nbytes for name in weight_map))
    return stored


def _read_shard(
    directory: Path, file: str, weight_map: Mapping[str, str], before: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Returns the tensors of one file by name. `before` has those of earlier files.

    Raises:
      InputError: the file is damaged, has a tensor of an earlier file, or one that the index places elsewhere or does
        not name.
    """
    tensors = read_header(directory / file)
    for name in tensors:
        if name in before:
            raise InputError(f"{directory} has {name} in {file} and in {before[name].file.name}: remove one of them")
        if weight_map.get(name, file) != file:
            raise InputError(
                f"{directory} has {name} in {file}, but its index says {weight_map[name]}: download it again"
            )
    unnamed = sorted(tensors.keys() - weight_map.keys())
    if weight_map and unnamed and file != MTP_WEIGHTS:
        raise InputError(
            f"{directory}: {len(unnamed)} tensors of {file} are not in its index, download the index again: "
            f"{join_names(unnamed)}"
        )
    return tensors


def _weight_map(file: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Returns the file of each tensor by the tensor's name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file} has no weight_map from tensors to files: download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise InputError(
                f"{file} places {name} in {short_repr(shard)}, which is no safetensors file beside it: download the "
                "index again, or move the files into one directory"
            )
    return weight_map


def _check_total_size(directory: Path, index: Mapping[str, Any], nbytes: int) -> None:
    """Warns if the total size in the index is not the size of the tensors, `nbytes`.

    This is no error: some writers count padding too, or count the tensors in another dtype. Names, shapes and dtypes of
    all tensors are checked elsewhere, so a wrong total alone does not mean that a tensor is missing.
    """
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != nbytes:
        logging.warning(
            "%s: its index says that the tensors have %s bytes, and they have %d; the tensors that are there are read",
            directory, short_repr(total), nbytes,
        )  # fmt: skip


def _check_shards(directory: Path, files: Sequence[str]) -> None:
    """Raises `InputError` unless the shards of a directory are those that its index names."""
    missing = [file for file in files if not (directory / file).is_file()]
    unfinished = unfinished_downloads(directory)
    if missing:
        remedy = (
            f"its download has not ended ({join_names(unfinished)}), run it again"
            if unfinished
            else "download the rest"
        )
        raise InputError(
            f"no {join_names(missing)} in {directory}, {len(missing)} of the {len(files)} files that {INDEX} names: "
            f"the checkpoint is incomplete, {remedy}"
        )
    others = [name for name in _safetensors_files(directory) if name not in files]
    if others:
        raise InputError(
            f"{directory} has {join_names(others)}, which {INDEX} does not name: move such files away, or download "
            "the index that belongs to them"
        )


def _check_single_file(directory: Path) -> None:
    """Raises `InputError` unless a release without an index has one file with weights, with the usual name."""
    names = _safetensors_files(directory)
    if names == [WEIGHTS]:
        return
    if WEIGHTS in names:
        others = [name for name in names if name != WEIGHTS]
        raise InputError(
            f"{directory} has {join_names(others)} beside {WEIGHTS}, and no {INDEX}: "
            f"move such files away if {WEIGHTS} has the whole model; if not, download the index"
        )
    missing = _missing_shards(names)
    shards = f", and the shards that are missing ({join_names(missing)})" if missing else ""
    alone = f"; if this file has the whole model, rename it to {WEIGHTS}" if len(names) == 1 and not missing else ""
    raise InputError(
        f"{directory} has {join_names(names) or MTP_WEIGHTS}, and neither {WEIGHTS} nor {INDEX}, which says which file "
        f"has which tensor: download the index{shards}{alone}"
    )


def _safetensors_files(directory: Path) -> list[str]:
    """Returns the names of the files of the model itself: without prediction heads and adapters."""
    ignored = {MTP_WEIGHTS, *adapter_files(directory)}
    return sorted(file.name for file in directory.glob("*.safetensors") if file.name not in ignored)


def _missing_shards(names: Sequence[str]) -> list[str]:
    """Returns the shards that should be beside those of `names`, according to the numbers in their names."""
    missing: set[str] = set()
    for stem, number, count in {match.groups() for match in map(_SHARD.fullmatch, names) if match}:
        missing |= {f"{stem}-{i:0{len(number)}}-of-{count}.safetensors" for i in range(1, int(count) + 1)}
    return sorted(missing - set(names))
