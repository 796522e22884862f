"""Finds the compilers for hardware that this machine lacks.

The compilers are installed in the virtual environment, or in its folder `compilers` (see `install_apart` in
tools/setup.sh).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

COMPILERS = Path(sys.prefix) / "compilers"
LIBTPU = (COMPILERS / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None
CUDA = all(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "tokamax"))
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Returns the environment variables of a process that finds the compilers, without the XLA flags of the tests."""
    folders = [str(ROOT), str(COMPILERS), os.environ.get("PYTHONPATH", "")]
    others = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {**others, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
