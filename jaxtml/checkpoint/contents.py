"""What a directory holds: a released Inkling checkpoint, a jaxtml checkpoint, or something that is refused.

A refusal says what is in the directory, what is missing, and what to do. Called by `checkpoint.opening` before any
checkpoint is opened, by `checkpoint.inkling.shards` and by `convert.extra_files`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jaxtml.checkpoint.files import CONFIG, RUN_CHECKPOINTS, STATE, VOCODER_SETTINGS, WEIGHT_SUFFIXES
from jaxtml.checkpoint.inkling.directory import INDEX, WEIGHTS, read_json
from jaxtml.checkpoint.inkling.safetensors_file import read_header
from jaxtml.errors import InputError, join_names

_SUPPORTED = "InklingForConditionalGeneration"
# Fields of a config.json that `transformers` wrote. The first three tell the family of the model.
_FOREIGN_FIELDS = ("model_type", "architectures", "text_config", "audio_config", "vision_config")
_NEWER = re.compile(r"inkling[ _-]?\d")
# Endings of unfinished downloads: of huggingface_hub, Chromium, Firefox, curl's scripts and aria2.
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".partial", ".aria2")
_HUB_DOWNLOADS = ".cache/huggingface/download"  # where huggingface_hub keeps unfinished files of a local folder
# Files of other trainers whose names end like those of weights, although these files hold no weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state).*")
_SAVE_AS_SAFETENSORS = "load it with transformers and write it again with model.save_pretrained(DIR)"


def is_release(directory: Path) -> bool:
    """Returns whether a directory has a released Inkling checkpoint; if not, it has one of ours or a training run.

    Raises:
      InputError: the directory is missing, or its files show that it holds neither. The files are not read further.
    """
    if directory.is_file():
        raise InputError(f"{directory} is a file: name the directory of a checkpoint or a training run")
    if not directory.is_dir():
        raise InputError(f"no checkpoint directory {directory}: name the directory of a checkpoint or a training run")
    adapters = adapter_files(directory)
    has_model = holds_arrays(directory) or _has_released_weights(directory, adapters)
    if adapters and not has_model:
        raise InputError(_refuse_adapter(directory, adapters))
    if not (directory / CONFIG).is_file():
        raise InputError(_without_config(directory))
    if adapters:
        logging.warning(
            "%s: jaxtml does not read adapters, so the model is the base alone, without %s; "
            "to have the adapter too, merge it into the base first (PEFT: merge_and_unload, then save_pretrained)",
            directory, join_names(adapters),
        )  # fmt: skip
    if (directory / VOCODER_SETTINGS).is_file() and (directory / RUN_CHECKPOINTS).is_dir():
        raise InputError(
            f"{directory} is a run of the vocoder alone: give it to a model with `jaxtml train CONFIG --vocoder`, "
            "or name the directory of a whole model"
        )
    if holds_arrays(directory):
        return False
    config = read_json(directory / CONFIG)
    if "backbone" in config:
        raise InputError(
            f"{directory} has the {CONFIG} of a jaxtml checkpoint, and neither its arrays (the folder {STATE}) nor a "
            f"run's {RUN_CHECKPOINTS}: copy the whole directory"
        )
    _check_family(directory, config)
    if not has_model:
        raise InputError(_without_weights(directory))
    return True


def holds_arrays(directory: Path) -> bool:
    """Returns whether a directory has the arrays of a jaxtml checkpoint, or the checkpoints of a training run."""
    return (directory / STATE).is_dir() or (directory / RUN_CHECKPOINTS).is_dir()


def adapter_files(directory: Path) -> list[str]:
    """Returns the names of the files of an adapter, such as those of PEFT and Tinker, that are in a directory."""
    return sorted(file.name for file in directory.iterdir() if file.is_file() and _belongs_to_adapter(file))


def _belongs_to_adapter(file: Path) -> bool:
    """Returns whether a file has the name of an adapter's file, or another name and the tensors of an adapter."""
    if file.name.startswith(("adapter_model", "adapter_config")):
        return True
    if file.suffix != ".safetensors" or file.name.startswith(("model", "mtp")):
        return False
    try:
        return any("lora_" in name for name in read_header(file))
    except InputError:  # whatever is wrong with the file is said when it is read as weights
        return False


def _has_released_weights(directory: Path, adapters: Sequence[str]) -> bool:
    """Returns whether a directory has the index or a safetensors file of a model."""
    files = (file.name for file in directory.glob("*.safetensors"))
    return (directory / INDEX).is_file() or any(name not in adapters for name in files)


def _refuse_adapter(directory: Path, adapters: Sequence[str]) -> str:
    config = directory / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    name = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"{directory} holds an adapter{name} ({join_names(adapters)}) and no model, and jaxtml does not read adapters: "
        "merge it into its base first (PEFT: merge_and_unload, then save_pretrained) and give the merged model"
    )


def _check_family(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises `InputError` if a `config.json` that `transformers` wrote is of a model other than multimodal Inkling.

    A config that names neither a model type nor an architecture passes: its other fields decide.
    """
    if not any(field in config for field in _FOREIGN_FIELDS):
        return
    architectures = config.get("architectures")
    found = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [architectures])]
    names = [name for name in found if isinstance(name, str) and name]
    described = f"{directory} holds {', '.join(dict.fromkeys(names))} (model_type and architectures in its {CONFIG})"
    lower = [name.lower() for name in names]
    if any("inkling" not in name for name in lower):
        raise InputError(f"{described}, which is no Inkling model: jaxtml reads {_SUPPORTED} and its own checkpoints")
    text = config.get("text_config")
    sections = [str(text.get("model_type")).lower()] if isinstance(text, dict) else []
    if any(_NEWER.search(name) for name in [*lower, *sections]):
        raise InputError(
            f"{described}, a later family than Inkling, with other layers: jaxtml does not support it yet; "
            f"give a checkpoint of {_SUPPORTED}"
        )
    if any(name == "inkling_text" or "causallm" in name for name in lower):
        raise InputError(
            f"{described}, the text model alone: jaxtml needs the towers for audio and video too; "
            f"give the multimodal checkpoint ({_SUPPORTED})"
        )


def _without_config(directory: Path) -> str:
    """Returns the refusal of a directory without a `config.json`."""
    begin = f"{directory} has no {CONFIG}"
    weights = _weights(directory)
    if (directory / STATE).is_dir():
        run = directory.resolve().parent.parent
        if (run / CONFIG).is_file() and directory.resolve().parent.name == RUN_CHECKPOINTS:
            return f"{begin}: it is one step of the training run {run}; name {run}, whose newest step is read"
        return f"{begin}, only the arrays of a jaxtml checkpoint ({STATE}): copy its {CONFIG} beside them"
    if directory.name == RUN_CHECKPOINTS and (directory.resolve().parent / CONFIG).is_file():
        run = directory.resolve().parent
        return f"{begin}: it has the steps of the training run {run}; name {run}"
    if weights:
        return f"{begin}, only weights ({join_names(weights)}): download the {CONFIG} of the same checkpoint too"
    unfinished = unfinished_downloads(directory)
    if unfinished:
        return f"{begin}: its download has not ended ({join_names(unfinished)}); run the download again"
    inside = sorted({str(file.parent.relative_to(directory)) for file in _configs_inside(directory)})
    if inside:
        return f"{begin}; name the checkpoint in it: {join_names([str(directory / name) for name in inside])}"
    names = sorted(file.name for file in directory.iterdir())
    holds = f"it holds {join_names(names)}" if names else "it is empty"
    return f"{begin}, so it is no checkpoint: {holds}; name the directory of a checkpoint or a training run"


def _configs_inside(directory: Path) -> list[Path]:
    """Returns the configs in a directory's folders, and in the snapshots of a model hub's cache."""
    return [*directory.glob(f"*/{CONFIG}"), *directory.glob(f"snapshots/*/{CONFIG}")]


def _without_weights(directory: Path) -> str:
    """Returns the refusal of a directory that has Inkling's `config.json` and no safetensors file."""
    unfinished, weights = unfinished_downloads(directory), _weights(directory)
    if unfinished:
        return (
            f"{directory} has a {CONFIG} and no weights yet: its download has not ended ({join_names(unfinished)}); "
            "run the download again"
        )
    if weights:
        gguf = all(name.endswith(".gguf") for name in weights)
        remedy = "download the safetensors of the model" if gguf else _SAVE_AS_SAFETENSORS
        return f"{directory} has its weights as {join_names(weights)}, and jaxtml reads safetensors alone: {remedy}"
    return (
        f"{directory} has a {CONFIG} and no weights: download {WEIGHTS}, or all shards and {INDEX}, into this directory"
    )


def _weights(directory: Path) -> list[str]:
    """Returns the names of the files with weights, in any format."""
    names = (file.name for file in directory.iterdir() if file.name.endswith(WEIGHT_SUFFIXES))
    return sorted(name for name in names if not _NO_WEIGHTS.fullmatch(name))


def unfinished_downloads(directory: Path) -> list[str]:
    """Returns the paths of unfinished downloads of a directory: in it, or where huggingface_hub keeps them."""
    places = [directory, directory / _HUB_DOWNLOADS]
    if directory.parent.name == "snapshots":
        places.append(directory.parent.parent / "blobs")
    files = (file for place in places if place.is_dir() for file in place.iterdir())
    return sorted(os.path.relpath(file, directory) for file in files if file.name.endswith(_UNFINISHED))
