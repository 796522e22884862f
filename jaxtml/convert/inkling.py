"""Inkling checkpoints in and out: the released layout <-> our stacked parameters, through the ParamSpec table alone.

Each spec's `Released` says where a parameter stands and how its axes lie; `Stack.layer_index` unrolls stacks of layers.
What the released model lacks (clock, own voice, flow head, vocoder, control tokens) is initialised from a seed.

Axes: R repeats of a block, L layers of a run (the stacked dimensions), V vocabulary, D model width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from absl import logging
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxtml.config import Config
from jaxtml.convert.inkling_config import config_from_inkling, inkling_config
from jaxtml.errors import InputError
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import Params, ParamSpec, flatten, init_params
from jaxtml.stream.tokens import CONTROLS

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
MTP_WEIGHTS = "mtp.safetensors"  # the released prediction heads' own file
_MTP = "model.mtp."
_SHOWN = 5  # names listed in an error before "and N more"


class Place(NamedTuple):
    """One released tensor: our path, the index in the stacked dimensions, the released name."""

    path: str
    spec: ParamSpec
    index: tuple[int, ...]
    name: str


def places(config: Config) -> Iterator[Place]:
    """Every tensor of the released layout, in the order of our table."""
    model = InteractionModel(config)
    for path, spec in flatten(model.specs()):
        if spec.released is None:
            continue
        if not spec.stacked:
            yield Place(path, spec, (), spec.released.name)
            continue
        stack = model.mtp if path.startswith("mtp/") else model.backbone
        assert stack is not None
        block, run = (int(part.removeprefix("block").removeprefix("run")) for part in path.split("/")[1:3])
        for repeat in range(spec.shape[0]):
            for layer in range(spec.shape[1]):
                index = stack.layer_index(block, run, repeat, layer)
                yield Place(path, spec, (repeat, layer), spec.released.name.format(layer=index))


def load_inkling(directory: str | Path, seed: int = 0) -> tuple[Config, Params]:
    """Reads `config.json` and `model.safetensors` (or an index and shards, and `mtp.safetensors`); float32 parameters
    in host memory. Prediction heads that the config has and the files lack are left out, with a note in the log:
    `transformers` writes such checkpoints.

    Raises:
      InputError: no such directory, not an Inkling checkpoint, or tensors that are unknown, missing or misshapen.
    """
    directory = Path(directory)
    config = config_from_inkling(_read_json(directory / "config.json"), directory.name or "inkling")
    files = _tensor_files(directory)
    if config.backbone.mtp_heads and not any(name.startswith(_MTP) for name in files):
        logging.info("%s has no %s* tensors: its prediction heads are left out", directory, _MTP)
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, mtp_heads=0, mtp_global=()))
    wanted = {place.name: place for place in places(config)}
    unknown = sorted(files.keys() - wanted.keys())
    missing = sorted(wanted.keys() - files.keys())
    if unknown or missing:
        parts = [f"{len(names)} {what} tensors: {_some(names)}" for what, names in _named(missing, unknown) if names]
        raise InputError(f"{directory} does not fit its config.json: {'; '.join(parts)}")

    params = jax.tree.map(np.array, init_params(InteractionModel(config).specs(), seed))
    leaves = dict(flatten(params))
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            here = [wanted[name] for name in tensors.keys() if name in wanted]  # noqa: SIM118 (not a mapping)
            _check_shapes(file, tensors, here)
            for place in here:
                assert place.spec.released is not None
                tensor = np.asarray(tensors.get_tensor(place.name)).astype(np.float32)
                leaves[place.path][place.index] = place.spec.released.load(tensor)
    _fill_control_rows(config, leaves["embed/weight"], seed)
    return config, params


def save_inkling(directory: str | Path, config: Config, params: Params, dtype: str = "bfloat16") -> None:
    """Writes the backbone and its towers as a released checkpoint, in shards of 5 GB, that `transformers` reads.

    Parameters that Inkling lacks are left out: keep our own checkpoint for them. As released, the router's bias and
    scale stay float32.

    Raises:
      InputError: a `dtype` other than bfloat16 or float32, or a config that Inkling cannot describe.
    """
    if dtype not in ("bfloat16", "float32"):
        raise InputError(f"dtype {dtype!r}: a released checkpoint is bfloat16 or float32")
    described = inkling_config(config) | {"dtype": dtype}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    leaves = dict(flatten(params))
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)

    def tensor(place: Place) -> np.ndarray:
        assert place.spec.released is not None
        exact = place.name.endswith((".gate.bias", ".gate.global_scale"))
        ours = np.asarray(leaves[place.path][place.index], np.float32)
        return place.spec.released.save(ours).astype(np.float32 if exact else target)

    shards: list[list[Place]] = [[]]
    size = 0
    for place in places(config):
        assert place.spec.released is not None
        step = int(np.prod(place.spec.released.shape)) * target.itemsize
        if shards[-1] and size + step > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += step
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {place.name: name for name, shard in zip(names, shards, strict=True) for place in shard}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    for name, shard in zip(names, shards, strict=True):
        save_file({place.name: tensor(place) for place in shard}, directory / name, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}: give the directory of an Inkling checkpoint")
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, checked against what the files hold."""
    index = directory / INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        shards = sorted({directory / name for name in weight_map.values()})
    else:
        weight_map, shards = None, [directory / WEIGHTS]
    if (directory / MTP_WEIGHTS).is_file() and directory / MTP_WEIGHTS not in shards:
        shards.append(directory / MTP_WEIGHTS)
    held: dict[str, Path] = {}
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"no {shard.name} in {directory}: the checkpoint is incomplete")
        with _open(shard) as tensors:
            held |= dict.fromkeys(tensors.keys(), shard)
    if weight_map is not None:
        absent = sorted(weight_map.keys() - held.keys())
        if absent:
            raise InputError(f"{directory}: the index names {len(absent)} tensors that no shard holds: {_some(absent)}")
    return held


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:  # the library raises an exception of its own for every kind of damage
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _check_shapes(file: Path, tensors: safe_open, here: list[Place]) -> None:
    wrong = []
    for place in here:
        assert place.spec.released is not None
        found = tensors.get_slice(place.name)
        if tuple(found.get_shape()) != place.spec.released.shape:
            wrong.append(f"{place.name} is {tuple(found.get_shape())}, not {place.spec.released.shape}")
        elif found.get_dtype() not in _DTYPES:
            wrong.append(f"{place.name} is {found.get_dtype()}, not one of {', '.join(_DTYPES)}")
    if wrong:
        raise InputError(f"{file} has {len(wrong)} tensors that do not fit its config.json: {_some(wrong)}")


def _named(missing: list[str], unknown: list[str]) -> tuple[tuple[str, list[str]], ...]:
    return ("missing", missing), ("unknown", unknown)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _fill_control_rows(config: Config, embed: np.ndarray, seed: int) -> None:
    """Control tokens whose released rows are empty get a random row of the table's own size; `embed` `[V, D]`.

    An all-zero row would make every control token the same token after the norm.
    """
    base = config.duplex.control_base
    rows = embed[base : base + CONTROLS]
    empty = ~rows.any(axis=1)
    scale = float(np.sqrt(np.mean(np.square(embed[:base]))))
    noise = np.random.default_rng(seed).normal(0.0, scale, rows.shape).astype(np.float32)
    rows[empty] = noise[empty]
