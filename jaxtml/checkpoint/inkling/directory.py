"""The directory of a released checkpoint: the names of its files, and its JSON files.

Called by the other modules of `checkpoint.inkling`, and by `checkpoint.contents`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxtml.checkpoint.files import check_not_pointer
from jaxtml.errors import InputError

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
    check_not_pointer(path)
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, copy it again: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: copy it again")
    return value
