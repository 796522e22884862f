"""Names of the files and folders of a checkpoint.

A jaxtml checkpoint is a directory:

| name | holds |
|---|---|
| `config.json` | the resolved config |
| `tokenizer.json` | the tokenizer |
| `state/` and files beside it | the parameters, as Orbax writes a tree |
| `manifest.json` | checksums of all tensors and files; only `jaxtml convert` writes it |
| `released/` | the files beside the weights of the Inkling release that the checkpoint was converted from |

The directory of a training run has `config.json`, `tokenizer.json`, and in `checkpoints/` one folder for each saved
step.

This module imports nothing heavy: the command line imports it before it knows which command will run.
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
STATE = "state"
MANIFEST = "manifest.json"
RELEASE_FILES = "released"
RUN_CHECKPOINTS = "checkpoints"

SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"
"""The directory of the checkpoint that ships with the package."""
