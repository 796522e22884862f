"""Finds the extra files of a checkpoint: all that is neither its weights nor made from them.

Examples are the tokenizer, settings of processors, the model card and the license. A conversion copies them, so that a
release that was converted to ours and back has them again. Called by `convert.conversion`.
"""

from __future__ import annotations

from pathlib import Path

from absl import logging

from jaxtml.checkpoint.contents import adapter_files, holds_arrays
from jaxtml.checkpoint.files import MANIFEST, RELEASE_FILES, TOKENIZER, WEIGHT_SUFFIXES
from jaxtml.checkpoint.inkling.directory import INDEX
from jaxtml.checkpoint.inkling.layout import LAYOUT

_NOT_EXTRA = (INDEX, MANIFEST, LAYOUT)  # files that say how weights are stored: a conversion writes its own
LARGEST = 2**26  # bytes of an extra file; a larger file holds weights


def find_extra_files(directory: Path) -> dict[str, Path]:
    """Returns the extra files of a checkpoint by their names in a release. A release's `config.json` is among them.

    The log names the files and folders that are left out, except shards, the index, the manifest and hidden files.
    """
    is_release = not holds_arrays(directory)
    folder = directory if is_release else directory / RELEASE_FILES
    files = [file for file in sorted(folder.iterdir())] if folder.is_dir() else []
    kept = [file for file in files if file.is_file() and not _belongs_to_weights(file)]
    left_out = [file.name for file in files if file not in kept and not file.name.startswith(".")]
    left_out = [
        name for name in left_out if not name.endswith(".safetensors") and name not in (INDEX, MANIFEST, LAYOUT)
    ]
    if left_out:
        logging.info("not copied to the new checkpoint: %s", ", ".join(left_out))
    if not is_release and (directory / TOKENIZER).is_file():
        kept.append(directory / TOKENIZER)
    return {file.name: file for file in kept}


def _belongs_to_weights(file: Path) -> bool:
    """Returns whether a file has weights, belongs to an adapter, or says how weights are sharded or quantised.

    Hidden files count as well.
    """
    about_quantisation = file.suffix == ".json" and "quant" in file.name
    is_large = file.stat().st_size > LARGEST
    return (
        about_quantisation
        or is_large
        or file.name.endswith(WEIGHT_SUFFIXES)
        or file.name in (*_NOT_EXTRA, *adapter_files(file.parent))
        or file.name.startswith(".")
    )
