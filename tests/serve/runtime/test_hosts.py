"""A model on a mesh, and on the devices of two processes: sessions are those of one device; all end together."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.errors import InputError
from jaxtml.parallel.mesh import MeshShape
from jaxtml.session.engine import Engine
from jaxtml.session.records import SlotInput, SlotOutput
from jaxtml.session.slots import Slots
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from tests.serve.serving import Client

MESH = MeshShape(data=2, expert=4)


def gave(slots: Slots, waves: list[np.ndarray]) -> list[dict[int, SlotOutput]]:
    """What each micro-turn gives to sessions of which the second begins later and the first ends sooner."""
    streams, found = [DmelStream() for _ in waves], []
    for turn in range(len(waves[0]) // MICRO_TURN_SAMPLES):
        if turn == 0:
            slots.begin(0, 7, 0)
        if turn == 3:
            for session in range(1, len(waves)):
                slots.begin(session, session, 0)
        if turn == 10:
            slots.end(0)
        given = {}
        for session in slots.live:
            rows = slice(turn * MICRO_TURN_SAMPLES, (turn + 1) * MICRO_TURN_SAMPLES)
            streams[session], bins = streams[session].step(waves[session][rows])
            given[session] = SlotInput(bins)
        found.append(slots.step(given))
    return found


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory) -> Path:
    """The small model with sessions that devices of one group have in common."""
    config, params = read_checkpoint(checkpoint)
    config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, transport="replicated"))
    folder = tmp_path_factory.mktemp("shared") / "ck"
    save_checkpoint(folder, config, params, tokenizer_path=checkpoint / "tokenizer.json")
    return folder


def test_sessions_on_a_mesh_are_those_of_one_device(shared, slots, wave):
    waves = [np.roll(wave, 999 * n) for n in range(3)]
    spread = Slots(Engine.load(shared, MESH), 4, (1,))
    assert spread.buckets == (2, 4), "each part of the mesh has as many sessions"
    ours, theirs = gave(spread, waves), gave(slots, waves)
    assert spread.bucket == 4
    assert any(one.speaking for turn in theirs for one in turn.values()), "nothing of interest is compared"
    for turn, expected in zip(ours, theirs, strict=True):
        assert turn.keys() == expected.keys()
        for session, one in turn.items():
            np.testing.assert_array_equal(one.tokens, expected[session].tokens)
            np.testing.assert_allclose(one.wave, expected[session].wave, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "capacity", "said"),
    [
        (MeshShape(data=3), 3, "needs 3 devices, there are 8"),
        (MeshShape(data=2, expert=4), 12, "12 sessions do not divide into 8 parts"),
        (MeshShape(tensor=8), 8, "tensor=8 does not divide 1 kv heads"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(checkpoint, shape, capacity, said):
    with pytest.raises(InputError, match=said):
        Slots(Engine.load(checkpoint, shape), capacity)


def command(rank: int, port: int, checkpoint: Path, *more: str) -> subprocess.Popen[str]:
    """A server of two processes, each with two devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "NNODES": "2",
        "NODE_RANK": str(rank),
    }
    given = ["--checkpoint", str(checkpoint), "--port", "0", "--max-sessions", "4", "--mesh", "data=2,expert=2", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxtml", "serve", "--json", *given],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def two(checkpoint: Path, other: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    both = command(0, port, checkpoint), command(1, port, other or checkpoint)
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


async def talked(
    url: str, wave: np.ndarray, turns: int, first: subprocess.Popen[str], second: subprocess.Popen[str]
) -> np.ndarray:
    """What a client hears, of a server whose hosts are told to end meanwhile, the second before the first."""
    async with aiohttp.ClientSession() as http:
        client = Client(await http.ws_connect(f"{url}/v1/live/sessions"))
        pcm = {"format": {"type": "audio/pcm", "rate": 16000}}
        await client.send("session.start", session={"model": "small_test", "audio": pcm})
        await client.until("session.started")
        sound = base64.b64encode((wave * 32767).astype("<i2").tobytes()).decode()
        await client.send("session.input_audio.append", audio=sound)
        heard = [await client.until("session.output_audio.delta") for _ in range(turns)]
        second.send_signal(signal.SIGTERM)
        assert (await client.until("info"))["code"] == "going_away", "a host that is to go ends no session at once"
        first.send_signal(signal.SIGTERM)
        heard += [await client.until("session.output_audio.delta") for _ in range(2)]
        await client.send("session.close")
        await client.until("session.closed")
        return np.concatenate([np.frombuffer(base64.b64decode(one["delta"]), "<i2") for one in heard])


def test_two_processes_serve_one_model_and_end_together(checkpoint, wave):
    with two(checkpoint) as (first, second):
        assert first.stdout is not None and first.stderr is not None and second.stderr is not None
        said = json.loads(first.stdout.readline() or first.stderr.read())
        assert said["sessions"] == 4 and said["workers"] == 1
        heard = asyncio.run(talked(said["url"], wave, 8, first, second))
        assert np.abs(heard).max() > 0, "it speaks"
        assert (first.wait(30), second.wait(30)) == (0, 0)
        assert "Traceback" not in first.stderr.read() + second.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "server", "other host"])
def test_a_host_that_dies_takes_the_others_with_it(checkpoint, victim):
    with two(checkpoint) as both:
        first, second = both
        assert first.stdout is not None and first.stderr is not None and second.stderr is not None
        assert first.stdout.readline()
        (model,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill({"worker": int(model), "server": first.pid, "other host": second.pid}[victim], signal.SIGKILL)
        assert first.wait(20) == (-signal.SIGKILL if victim == "server" else 1)
        assert second.wait(20) == (-signal.SIGKILL if victim == "other host" else 1)
        said = {"worker": "the model's process", "server": "the server's process", "other host": "the model's process"}
        assert f"{said[victim]} is gone" in first.stderr.read()
        if victim != "other host":
            assert "the first host's process is gone" in second.stderr.read()


def test_what_is_wrong_on_another_host_ends_all(checkpoint, tmp_path):
    with two(checkpoint, tmp_path / "missing") as (first, second):
        assert (second.wait(60), first.wait(60)) == (2, 2)
        assert first.stderr is not None and second.stderr is not None
        said = second.stderr.read().splitlines()[-1]
        assert said.startswith("jaxtml serve: ") and "missing" in said
        assert "a process of another host is gone" in (log := first.stderr.read())
        assert log.splitlines()[-1].startswith("jaxtml serve: the model's process ended with status 1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mesh", "data=2", "--workers", "2"), "--mesh data=2 gives all devices to one worker: leave --workers out"),
        (("--mesh", "experts=2"), "no axis 'experts'"),
        ((), "there are several processes: say with --mesh how their devices share the model"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(options, said):
    alone = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "NNODES": "2", "NODE_RANK": "1"} if not options else {}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **alone}
    done = subprocess.run(
        [sys.executable, "-m", "jaxtml", "serve", *options], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2 and said in done.stderr.strip().splitlines()[-1]
