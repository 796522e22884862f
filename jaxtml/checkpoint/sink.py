"""Where parameters go."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from jaxtml.checkpoint.manifest import TensorRecord
from jaxtml.checkpoint.source import Index
from jaxtml.model.spec import ParamSpec


class ParameterSink(Protocol):
    """Where parameters go: a checkpoint in the making."""

    specs: dict[str, ParamSpec]

    def dtype(self, path: str) -> np.dtype: ...

    def prepare(self, folder: Path) -> None:
        """Makes everything but the numbers in `folder`; one that a killed conversion prepared is kept."""
        ...

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        """Writes one of `store.chunks` and returns it as it lies there, contiguous; threads write different ones side
        by side."""
        ...

    def manifest_record(self, path: str, at: tuple[int, ...], crc32: int) -> tuple[str, TensorRecord]:
        """What one layer's part of a parameter is called there, and is."""
        ...
