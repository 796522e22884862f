"""Names of the files and folders of a checkpoint."""

from __future__ import annotations

from pathlib import Path

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
STATE = "state"  # what Orbax calls a checkpoint's only tree
RUN_CHECKPOINTS = "checkpoints"  # where a training run has its steps
RELEASE_FILES = "released"  # folder of a checkpoint of ours with the files of the release that it was made of
MANIFEST = "manifest.json"
SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"
