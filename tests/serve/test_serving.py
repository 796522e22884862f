"""Tests of `jaxtml serve` as a process: it prints its address, serves, and ends in good order.

A server that cannot start prints one line on stderr and ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from jaxtml.commands.main import parser
from tests.serve.serving import Client


def command(*arguments: str | Path) -> list[str]:
    """Returns a command line of `jaxtml serve`."""
    return [sys.executable, "-m", "jaxtml", "serve", "--json", *map(str, arguments)]


def test_server_ends_after_sigint_when_its_sessions_have_ended(short_checkpoint):
    process = subprocess.Popen(
        command("--checkpoint", short_checkpoint, "--port", "0", "--max-sessions", "1", "--log-json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        summary = json.loads(process.stdout.readline() or process.stderr.read())
        assert summary["model"] == "small_test" and summary["sessions"] == 1 and summary["workers"] == 1
        asyncio.run(_talk_and_drain(summary["url"], process))
        assert process.wait(20) == 0
        log = process.stderr.read()
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        ended = next(line for line in lines if line["event"] == "session ended")
        assert (
            ended["reason"] == "close_requested" and ended["session"].startswith("sess_") and ended["level"] == "info"
        )
        assert [line["event"] for line in lines][-2:] == ["draining", "session ended"]
        assert "Traceback" not in log
    finally:
        process.kill()
        process.wait()


async def _talk_and_drain(url: str, process: subprocess.Popen[str]) -> None:
    """Talks to the server, signals it, and checks that the session may still end in its own time."""
    async with aiohttp.ClientSession() as http:
        async with http.get(f"{url}/ready") as ready:
            assert (await ready.json())["capacity"] == 1
        client = Client(await http.ws_connect(f"{url}/v1/live/sessions"))
        await client.send("session.start", session={"model": "small_test"})
        token = (await client.until("session.started"))["session"]["resume"]["token"]
        began = time.monotonic()
        for _ in range(6):
            await client.until("session.output_audio.delta")
        assert 0.9 < time.monotonic() - began < 3, "six micro-turns in real time"
        async with http.get(f"{url}/metrics") as metrics:
            text = await metrics.text()
        assert 'duplex_sessions_total{protocol="live"} 1.0' in text and "duplex_compilations_total 0.0" in text
        assert "duplex_sessions_active 1.0" in text and token not in text
        os.killpg(process.pid, signal.SIGINT)  # a terminal does the same: the workers get the signal too
        assert (await client.until("info"))["code"] == "going_away"
        async with http.get(f"{url}/ready") as ready:
            assert ready.status == 503
        await client.send("session.close")
        assert (await client.until("session.closed"))["reason"] == "close_requested"


def test_server_that_is_told_to_end_while_it_loads_ends_at_once_with_its_workers(short_checkpoint):
    process = subprocess.Popen(
        command("--checkpoint", short_checkpoint, "--port", "0", "--max-sessions", "2", "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        workers: list[str] = []
        while len(workers) < 2:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        log = process.stderr.read()
        assert "told to end before it was ready" in log and "Traceback" not in log
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        process.kill()
        process.wait()


def test_server_whose_worker_dies_tells_its_clients_and_ends(short_checkpoint):
    process = subprocess.Popen(
        command("--checkpoint", short_checkpoint, "--port", "0", "--max-sessions", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = json.loads(process.stdout.readline() or process.stderr.read())["url"]

        async def main() -> None:
            async with aiohttp.ClientSession() as http:
                client = Client(await http.ws_connect(f"{url}/v1/live/sessions"))
                await client.send("session.start", session={"model": "small_test"})
                await client.until("session.output_audio.delta")
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for child in children:
                    os.kill(int(child), signal.SIGKILL)
                assert (await client.until("error"))["error"]["type"] == "server_error"
                assert (await client.until("session.closed"))["reason"] == "connection_lost"
                assert await client.closed() == 1011

        asyncio.run(main())
        assert process.wait(20) == 1
        assert "the model's process is gone" in process.stderr.read()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 can be reached by other machines: give --keys FILE"),
        (("--keys", "missing.json"), "no keys in missing.json"),
        (("--model-alias", "two names"), "--model-alias 'two names': give one name"),
        (("--host", "nowhere.invalid"), "--host 'nowhere.invalid': "),
        (("--checkpoint", "missing"), "missing"),
        (("--workers", "9", "--max-sessions", "2"), "9 workers for 2 sessions"),
    ],
)
def test_wrong_options_are_one_line_on_stderr(arguments, line, tmp_path):
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, cwd=tmp_path, env=_environment()
    )
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jaxtml serve: ") and line in last and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--port", ("99999", "-1", "http", "80.5")),
        ("--max-sessions", ("0", "-3", "1000000000", "inf")),
        ("--workers", ("-1", "two")),
        ("--session-minutes", ("inf", "nan", "-1", "0", "1e300")),
        ("--resume-seconds", ("inf", "nan", "-1")),
        ("--drain-seconds", ("inf", "nan", "-0.1", "soon")),
        ("--keys", ("",)),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_starts(option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            parser().parse_args(["serve", f"{option}={value}"])
        assert ended.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("jaxtml serve: ") and option in last, last


def test_port_that_is_taken_is_one_line_on_stderr(short_checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ("--checkpoint", short_checkpoint, "--max-sessions", "1", "--port", port)
        done = subprocess.run(command(*options), capture_output=True, text=True, timeout=200, env=_environment())
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"jaxtml serve: cannot listen on 127.0.0.1:{port}: ")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
