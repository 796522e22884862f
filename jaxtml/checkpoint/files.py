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

from jaxtml.errors import InputError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
STATE = "state"
MANIFEST = "manifest.json"
VOCODER_SETTINGS = "training.json"  # a run of the vocoder has this file, and a run of the model has not
RELEASE_FILES = "released"
RUN_CHECKPOINTS = "checkpoints"

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"),
    *(".tflite", ".pkl", ".mlx", ".distcp"),
)
"""The endings of files with weights, in the formats of all frameworks. jaxtml reads `.safetensors` alone."""

_LFS_POINTER = b"version https://git-lfs"  # github.com/git-lfs/git-lfs/blob/main/docs/spec.md

SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"
"""The directory of the checkpoint that ships with the package."""


def check_not_pointer(file: Path) -> None:
    """Raises `InputError` if a file is a pointer of Git LFS: a few lines of text that stand for the real file."""
    with open(file, "rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}")
