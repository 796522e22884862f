"""What SIGHUP does to a server: it reads its files again, or drains, or goes on after `nohup`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from jaxtml.errors import InputError
from jaxtml.serve import signals
from jaxtml.serve.signals import ServerSignals


@pytest.fixture(autouse=True)
def hangup():
    """Lets SIGHUP do what it does in a new process, also if the tests run after `nohup`; restores it afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


async def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.05)


def test_sighup_drains_a_server_that_has_no_files_to_read_again():
    async def main() -> None:
        server = ServerSignals(None)
        await hang_up()
        await hang_up()
        assert server.drain.is_set() and not server.now.is_set(), "a terminal may send it twice"

    asyncio.run(main())


def test_sighup_reads_the_files_again_and_survives_a_wrong_one(caplog):
    calls = []

    def reload() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InputError("keys.json has no keys")

    async def main() -> None:
        server = ServerSignals(reload)
        for _ in range(3):
            await hang_up()
        assert len(calls) == 3 and not server.drain.is_set()

    asyncio.run(main())
    assert "stay in force: keys.json has no keys" in caplog.text


@pytest.mark.parametrize(("nohup", "drains"), [(False, True), (True, False)])
def test_closed_terminal_drains_a_server_with_keys_unless_nohup_started_it(monkeypatch, nohup, drains):
    terminal = iter([True, False])
    monkeypatch.setattr(signals, "_has_terminal", lambda: next(terminal))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    calls = []

    async def main() -> None:
        server = ServerSignals(lambda: calls.append(1))
        await hang_up()
        assert server.drain.is_set() == drains and not calls

    asyncio.run(main())


def test_server_without_files_goes_on_after_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def main() -> None:
        server = ServerSignals(None)
        await hang_up()
        assert not server.drain.is_set()

    asyncio.run(main())


def test_other_hosts_pass_sighup_on_only_if_the_first_one_drains_at_it():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.SIGHUP in signals.follower_drains(has_files=False)
    assert signal.SIGHUP not in signals.follower_drains(has_files=True) and signals.ignores_hangup()


def test_process_without_a_terminal_knows_that_it_has_none():
    script = "from jaxtml.serve import signals; print(signals._has_terminal())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=True)
    assert done.stdout.strip() == "False"
