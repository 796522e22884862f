"""Verifies a conversion: compares the result with its source, tensor by tensor, and then their logits.

Called by `convert.conversion` for `jaxtml convert --verify`.
"""

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
from jaxtml.checkpoint.files import MANIFEST
from jaxtml.checkpoint.manifest import crc32, read_manifest
from jaxtml.checkpoint.nonfinite import has_nonfinite
from jaxtml.checkpoint.source import ParameterSource, read_parameters, spec_table
from jaxtml.convert.inspection import compare_with_manifest
from jaxtml.convert.logits import text_logits
from jaxtml.convert.progress import CopyProgress
from jaxtml.convert.tensor_names import source_names
from jaxtml.convert.threads import run_in_threads
from jaxtml.errors import InputError, join_names
from jaxtml.model.spec import ParamSpec

PROMPT_TOKENS = 64  # tokens whose logits are compared
ROUNDING = 1e-4  # how far logits of equal parameters may differ, as a share of their norm
CGROUP = Path("/sys/fs/cgroup")


class VerificationFailed(InputError):
    """The result of a conversion differs from its source."""


def check_source(source: Path) -> None:
    """Compares a source that `jaxtml convert` wrote with its own manifest. Other sources have no checksums.

    Raises:
      VerificationFailed: the source is not as it was written.
    """
    if not (source / MANIFEST).is_file():
        return
    try:
        read_manifest(source)
    except InputError as error:  # many programs write a file of this name
        logging.warning("%s; the values of the source are not compared with it", error)
        return
    changed, _, _ = compare_with_manifest(source)
    if changed:
        logging.info("all that has changed:\n%s", "\n".join(changed))
        raise VerificationFailed(
            f"{source} is damaged or was changed: {join_names(changed)} differ from its {MANIFEST}, and nothing is "
            "verified; give an undamaged copy, or convert without --verify"
        )


def verify_conversion(original: ParameterSource, source: ParameterSource, result: ParameterSource, to: str) -> str:
    """Compares the result's tensors with those of `source`, and the result's logits with those of `original`.

    Logits are compared if there is enough memory. They must be equal within rounding if both models have the same
    dtypes and the same windows of global layers.

    Args:
      original: the checkpoint that was converted.
      source: the parameters that were converted: `original`, or a warm start from it.
      result: the checkpoint that was written.
      to: "orbax" or "hf". An "hf" result has only released parameters.

    Returns:
      What was verified, a phrase for the summary.

    Raises:
      VerificationFailed: tensors or logits differ.
      InputError: tensors are equal, and some tensors or the logits have NaN or infinite values.
    """
    specs = {
        path: spec for path, spec in spec_table(result.config).items() if to == "orbax" or spec.released is not None
    }
    verified = f"verified, {compare_tensors(source, result, specs)} tensors equal"
    # An estimate: twice the parameters as float32.
    needed, free = 2 * parameter_bytes(spec_table(source.config), lambda path: np.dtype(np.float32)), _free_memory()
    if needed > free:
        return f"{verified}, logits not compared: that takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    ids = np.random.default_rng(0).integers(0, result.config.duplex.control_base, (1, PROMPT_TOKENS))
    theirs, ours = (
        text_logits(checkpoint.config, read_parameters(checkpoint), ids) for checkpoint in (original, result)
    )
    if not np.isfinite(theirs).all() and not np.isfinite(ours).all():
        raise InputError(
            "all tensors are equal and finite, and the logits of both models have NaN or infinite values: "
            "give a sound source, or convert without --verify"
        )
    if np.array_equal(theirs, ours):
        return f"{verified}, logits of {PROMPT_TOKENS} tokens too"
    difference = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
    if not np.isfinite(difference) or (_compute_alike(original, result, specs) and difference > ROUNDING):
        raise VerificationFailed(f"all tensors are equal, and the logits differ by {difference:.2e} of their norm")
    return f"{verified}, logits of {PROMPT_TOKENS} tokens differ by {difference:.2e} of their norm"


def compare_tensors(
    source: ParameterSource, result: ParameterSource, specs: Mapping[str, ParamSpec], workers: int | None = None
) -> int:
    """Compares every layer of the parameters in `specs`, in the result's dtype, by checksums.

    Returns:
      How many tensors were compared.

    Raises:
      VerificationFailed: tensors differ. The message names the first, and the log all of them.
      InputError: tensors are equal, and some have NaN or infinite values. The message names the first five.
    """
    nonfinite: set[str] = set()

    def checksum(parameters: ParameterSource, layer: LayerChunks, stop: threading.Event) -> int:
        crc = 0
        for index in layer.indices:
            if stop.is_set():
                raise CancelledError
            values = parameters.read(layer.path, index).astype(result.dtype(layer.path), copy=False)
            crc = crc32(values, crc)
            if has_nonfinite(values):
                nonfinite.add(layer.name)
            progress.add(values.nbytes)
        return crc

    def compare(layer: LayerChunks, stop: threading.Event) -> str | None:
        return None if checksum(source, layer, stop) == checksum(result, layer, stop) else layer.name

    work = conversion_chunks(specs, result.dtype)
    progress = CopyProgress(2 * parameter_bytes(specs, result.dtype), 0, "verified ")
    different = sorted(name for name in run_in_threads(compare, work, workers) if name)
    if different:
        logging.info("all tensors that differ:\n%s", "\n".join(different))
        raise VerificationFailed(
            f"the result differs from its source in {len(different)} of {len(work)} tensors, first in {different[0]}"
        )
    if nonfinite:
        names = join_names(source_names(source, work, nonfinite))
        raise InputError(
            f"all tensors are equal, and {len(nonfinite)} of {len(work)} have NaN or infinite values, in the source "
            f"too: {names}; give a sound source, or convert without --verify"
        )
    return len(work)


def _compute_alike(original: ParameterSource, result: ParameterSource, specs: Mapping[str, ParamSpec]) -> bool:
    """Returns whether two checkpoints with equal tensors should give the same logits."""
    paths = spec_table(original.config)
    return original.config.backbone.global_ == result.config.backbone.global_ and all(
        path in paths and original.dtype(path) == result.dtype(path) for path in specs
    )


def _free_memory() -> int:
    """Returns how many bytes are free: the least of the first device, the host and this process's control group."""
    stats = jax.devices()[0].memory_stats() or {}
    free = [psutil.virtual_memory().available]
    if "bytes_limit" in stats:
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int(used.read_text()))
    return min(free)
