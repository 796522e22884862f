"""Finds the oracle of the parity tests: torch and `transformers`. Imported by tests/conftest.py and by tests.

`tools/test` installs them into `.venv/oracle`, apart from the environment: where torch can be imported, tensorboardX
imports it into every training run. Only tests marked `oracle`, and the tools that they start, see that folder.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORACLE = Path(sys.prefix) / "oracle"
TORCHVISION = Path(sys.prefix) / "torchvision"
# Torch's threads wait for each other. While a second test process takes the cores, they wait for seconds.
ONE_THREAD = ("OMP_NUM_THREADS", "1")
MISSING = "needs torch and transformers: pip install -e '.[oracle]'"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before a test marked `oracle`: makes torch and `transformers` importable, or skips the test."""
    if item.get_closest_marker("oracle") is None:
        return
    os.environ.setdefault(*ONE_THREAD)
    if ORACLE.is_dir() and str(ORACLE) not in sys.path:
        sys.path.append(str(ORACLE))  # at the end, so that the environment's packages win over the folder's
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip(MISSING)


def oracle_environment(*more: Path) -> dict[str, str]:
    """Returns the environment of a process that can import this checkout, the oracle and the folders `more`."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(ORACLE), *map(str, more)]
    return dict([ONE_THREAD]) | {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
