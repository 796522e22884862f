"""The list of tests that a run left out, and why. Imported by tests/conftest.py as pytest hooks.

A run ends with this list so that nobody takes "all passed" for "everything ran". Skips are grouped by their reason. A
reason names what is missing and how to install it. Tests that were deselected (`-m`, `-k`) are counted. With
pytest-xdist the worker processes deselect tests and send their counts to the main process.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

DESELECTED = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        stash = items[0].config.stash
        stash[DESELECTED] = stash.get(DESELECTED, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker process of pytest-xdist: leaves the count for the main process."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = session.config.stash.get(DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the main process of pytest-xdist: keeps the largest count. All workers have deselected the same tests."""
    stash, count = node.config.stash, getattr(node, "workeroutput", {}).get("deselected", 0)
    stash[DESELECTED] = max(stash.get(DESELECTED, 0), count)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        _, _, reason = report.longrepr
        by_reason[reason.removeprefix("Skipped: ")].append(report.nodeid)
    deselected = config.stash.get(DESELECTED, 0)
    if not by_reason and not deselected:
        return
    terminalreporter.section("tests that did not run")
    for reason, tests in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        files = sorted({test.partition("::")[0] for test in tests})
        terminalreporter.write_line(f"{len(tests):4}  {reason}")
        terminalreporter.write_line(f"      in {', '.join(files)}")
    if deselected:
        options = " ".join(f"{flag} {value!r}" for flag in ("-m", "-k") if (value := _option(config, flag)))
        terminalreporter.write_line(f"{deselected:4}  not selected by {options or 'the arguments'}")


def _option(config: pytest.Config, flag: str) -> str:
    return config.getoption(flag, default="") or ""
