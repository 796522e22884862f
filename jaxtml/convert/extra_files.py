"""Files beside the weights."""

from __future__ import annotations

from pathlib import Path

from absl import logging

from jaxtml.checkpoint.files import MANIFEST, RELEASE_FILES, TOKENIZER
from jaxtml.checkpoint.inkling.directory import INDEX

LARGEST = 2**26  # bytes of a file that comes along
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def find_extra_files(directory: Path) -> dict[str, Path]:
    """The files of a checkpoint that are neither its weights nor made of them, by their names in a release: what
    tokenizes and prepares, model cards, licenses; of a release its `config.json` too. What is left out is logged."""
    released = any(directory.glob("*.safetensors"))
    folder = directory if released else directory / RELEASE_FILES
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    kept = [file for file in found if file.is_file() and not _is_of_weights(file)]
    left = [file.name for file in found if file not in kept and not file.name.startswith(".")]
    left = [name for name in left if not name.endswith(".safetensors") and name not in (INDEX, MANIFEST)]
    if left:
        logging.info("left out, as no part of the new checkpoint: %s", ", ".join(left))
    if not released and (directory / TOKENIZER).is_file():
        kept.append(directory / TOKENIZER)
    return {file.name: file for file in kept}


def _is_of_weights(file: Path) -> bool:
    """Whether a file beside a release's shards has weights, or says how those are numbered or quantised."""
    about = file.suffix == ".json" and "quant" in file.name
    large = file.stat().st_size > LARGEST
    return about or large or file.suffix in _WEIGHTS or file.name in (INDEX, MANIFEST) or file.name.startswith(".")
