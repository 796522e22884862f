"""Where parameters go: the `ParameterSink` protocol, a checkpoint that is being written.

The conversion (`convert.streaming`) fills a sink. The sinks are a jaxtml checkpoint (`checkpoint.orbax.sink`) and a
released Inkling checkpoint (`checkpoint.inkling.sink`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from jaxtml.checkpoint.manifest import TensorRecord
from jaxtml.checkpoint.source import Index, Position
from jaxtml.model.spec import ParamSpec


class ParameterSink(Protocol):
    """A checkpoint that is being written. `specs` has the parameters that the checkpoint gets."""

    specs: dict[str, ParamSpec]

    @property
    def layout_id(self) -> str:
        """Identifies where values lie in the files.

        An interrupted conversion is resumed only if the new conversion has the same layout.
        """
        ...

    def dtype(self, path: str) -> np.dtype:
        """Returns the dtype in which the parameter is written."""
        ...

    def prepare(self, folder: Path) -> None:
        """Makes the whole checkpoint in `folder`, except for the values of the parameters.

        If an interrupted conversion has prepared the folder before, keeps the folder and the values in it.
        """
        ...

    def write(self, path: str, index: Index, values: np.ndarray) -> np.ndarray:
        """Writes one chunk (`checkpoint.chunks`) and returns its values as they lie in the file, contiguous.

        Several threads may write different chunks at the same time.
        """
        ...

    def manifest_record(self, path: str, position: Position, crc32: int) -> tuple[str, TensorRecord]:
        """Returns the name and the record of one layer's part of a parameter for the manifest.

        `crc32` is the checksum of all that `write` has returned for this part, in the order of the chunks.
        """
        ...
