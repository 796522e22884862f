"""Verifies a conversion."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from pathlib import Path

import jax
import numpy as np
import psutil
from absl import logging

from jaxtml.checkpoint.chunks import LayerChunks, conversion_chunks, parameter_bytes
from jaxtml.checkpoint.manifest import crc32
from jaxtml.checkpoint.opening import read_parameters
from jaxtml.checkpoint.source import ParameterSource, spec_table
from jaxtml.convert.progress import CopyProgress
from jaxtml.convert.threads import run_in_threads
from jaxtml.errors import InputError
from jaxtml.model.spec import ParamSpec

PROMPT = 64  # tokens of which logits are compared
ROUNDING = 1e-4  # by which those of equal numbers may differ, of their norm
CGROUP = Path("/sys/fs/cgroup")


class VerificationFailed(InputError):
    """A result is not what it was made of."""


def compare_tensors(
    source: ParameterSource, result: ParameterSource, specs: Mapping[str, ParamSpec], workers: int | None = None
) -> int:
    """Holds every layer of `result` to the source, in the dtype of the result, by checksums; returns how many.

    Raises:
      Differs: the first layer is named, all of them in the log.
    """

    def checksum(of: ParameterSource, layer: LayerChunks, stop: threading.Event) -> int:
        found = 0
        for index in layer.indices:
            if stop.is_set():
                raise CancelledError
            values = of.read(layer.path, index).astype(result.dtype(layer.path), copy=False)
            found = crc32(values, found)
            progress.add(values.nbytes)
        return found

    def one(layer: LayerChunks, stop: threading.Event) -> str | None:
        return None if checksum(source, layer, stop) == checksum(result, layer, stop) else layer.name

    work, progress = (
        conversion_chunks(specs, result.dtype),
        CopyProgress(2 * parameter_bytes(specs, result.dtype), 0, "verified "),
    )
    wrong = sorted(name for name in run_in_threads(one, work, workers) if name)
    if wrong:
        logging.info("all that differ:\n%s", "\n".join(wrong))
        raise VerificationFailed(
            f"the result differs from its source in {len(wrong)} of {len(work)} layers, first in {wrong[0]}"
        )
    return len(work)


def verify_conversion(held: ParameterSource, source: ParameterSource, result: ParameterSource, to: str) -> str:
    """Holds a result to the source that it was made of, and its logits to those of the checkpoint as it was held."""
    specs = {
        path: spec for path, spec in spec_table(result.config).items() if to == "orbax" or spec.released is not None
    }
    said = f"verified, {compare_tensors(source, result, specs)} tensors equal"
    needed, free = 2 * parameter_bytes(spec_table(source.config), lambda path: np.dtype(np.float32)), _free_memory()
    if needed > free:
        return f"{said}, logits not compared: that takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    from jaxtml.convert.logits import text_logits

    ids = np.random.default_rng(0).integers(0, result.config.duplex.control_base, (1, PROMPT))
    theirs, ours = (text_logits(*read_parameters(checkpoint), ids) for checkpoint in (held, result))
    if np.array_equal(theirs, ours, equal_nan=True):
        return f"{said}, logits of {PROMPT} tokens too"
    apart = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
    before = spec_table(held.config)
    alike = held.config.backbone.global_ == result.config.backbone.global_ and all(
        path in before and held.dtype(path) == result.dtype(path) for path in specs
    )
    if not np.isfinite(apart) or (alike and apart > ROUNDING):
        raise VerificationFailed(f"all tensors are equal, and the logits differ by {apart:.2e} of their norm")
    return f"{said}, logits of {PROMPT} tokens differ by {apart:.2e} of their norm"


def _free_memory() -> int:
    """Bytes that the first device has left, the host, and the control group that this process is in."""
    held = jax.devices()[0].memory_stats() or {}
    found = [held["bytes_limit"] - held["bytes_in_use"]] if "bytes_limit" in held else []
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min([*found, psutil.virtual_memory().available])
