"""Where the compilers for hardware that is not here are: in the environment, or apart from it (tools/setup.sh)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

APART = Path(sys.prefix) / "compilers"
LIBTPU = (APART / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None
CUDA = all(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "tokamax"))
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process that finds them; the flags of the tests' own compiler are not theirs."""
    found = [str(ROOT), str(APART), os.environ.get("PYTHONPATH", "")]
    rest = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {**rest, "PYTHONPATH": os.pathsep.join(filter(None, found))}
