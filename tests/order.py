"""The order in which test files run. Imported by tests/conftest.py as a pytest hook.

Two processes take the files one by one (`--dist loadfile`). A long file that is taken last leaves one process idle
while the other works on it. So the longest files are taken first.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Files that take over 15 s on two cores, longest first.
LONGEST_FIRST = (
    "tools/test_tools.py",
    "train/test_loop.py",
    "plan/test_planning.py",
    "model/duplex/test_programs.py",
    "train/test_sharded_step.py",
    "serve/runtime/test_hosts.py",
    "train/test_step.py",
    "plan/test_chips.py",
    "convert/test_verification.py",
    "convert/test_streaming.py",
    "model/test_mtp.py",
    "commands/test_documented.py",
    "model/attention/test_retention.py",
    "model/duplex/test_grammar.py",
    "serve/runtime/test_worker.py",
    "serve/test_serving.py",
    "test_examples.py",
    "model/test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the longest files to the front and leaves the order of the others as it is."""
    rank = {TESTS / file: number for number, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
