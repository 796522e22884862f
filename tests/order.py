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
    "plan/test_planning.py",
    "train/test_loop.py",
    "tools/test_tools.py",
    "train/test_sharded_step.py",
    "model/duplex/test_programs.py",
    "plan/test_chips.py",
    "train/test_step.py",
    "serve/runtime/test_hosts.py",
    "checkpoint/test_metadata.py",
    "convert/test_streaming.py",
    "serve/runtime/test_worker.py",
    "serve/runtime/test_pool.py",
    "serve/protocols/realtime/test_realtime.py",
    "serve/transport/test_peer.py",
    "commands/test_documented.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the longest files to the front and leaves the order of the others as it is."""
    rank = {TESTS / file: number for number, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
