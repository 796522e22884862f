"""The order in which test files run. Imported by tests/conftest.py as a pytest hook.

Two processes take the files one by one (`--dist loadfile`). A long file that is taken last leaves one process idle
while the other works on it. So the longest files are taken first.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Files that take over 20 s on two cores, longest first.
LONGEST_FIRST = (
    "train/test_loop.py",
    "plan/test_planning.py",
    "train/test_sharded_step.py",
    "tools/test_tools.py",
    "convert/test_verification.py",
    "model/duplex/test_programs.py",
    "serve/runtime/test_hosts.py",
    "serve/runtime/test_worker.py",
    "model/test_backbone.py",
    "model/attention/test_flash.py",
    "plan/test_chips.py",
    "serve/test_serving.py",
    "train/test_step.py",
    "test_examples.py",
    "model/test_mtp.py",
    "commands/test_converse.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the longest files to the front and leaves the order of the others as it is."""
    rank = {TESTS / file: number for number, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
