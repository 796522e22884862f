"""`jaxtml info DIR`: what a checkpoint is, without reading its numbers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from jaxtml.config import Config
from jaxtml.convert.checkpoint import RUN, TOKENIZER, OrbaxCheckpoint
from jaxtml.convert.command import opened
from jaxtml.convert.released import ReleasedCheckpoint
from jaxtml.convert.source import table


def described(directory: str | Path) -> tuple[Config, dict[str, Any]]:
    """The config of a checkpoint, and `kind`, `step` (of a run; else None), `dtypes` (numbers of each, as held),
    `bytes` on disk and `uses`: what can be done with it. Raises `InputError` where it is none."""
    directory = Path(directory)
    source = opened(directory)
    dtypes: Counter[str] = Counter()
    for path, spec in table(source.config).items():
        if source.holds(path):
            dtypes[source.dtype(path).name] += math.prod(spec.shape)
    folder, step = directory, None
    if isinstance(source, ReleasedCheckpoint):
        formats = sorted({"NVFP4" if ".scale2" in parts else "MXFP8" for parts in source.parts.values()})
        kind = f"Inkling checkpoint{', routed experts in ' + ' and '.join(formats) if formats else ''}"
        uses = ["logits", "convert (to speak: --as tml_interaction_small)", "train --start-from"]
    else:
        assert isinstance(source, OrbaxCheckpoint)
        step = source.step
        kind = "training run" if step is not None else "jaxtml checkpoint"
        folder = directory / RUN / str(step) if step is not None else directory
        uses = ["logits", "convert"]
        if (directory / TOKENIZER).is_file():
            uses += ["converse", *(["train (goes on)"] if step is not None else ["train --start-from"])]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return source.config, {"kind": kind, "step": step, "dtypes": dict(dtypes), "bytes": size, "uses": uses}
