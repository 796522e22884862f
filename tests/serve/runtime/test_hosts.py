"""Tests of a model on a mesh of one process, and of a model on the devices of two processes.

The tests check that the outputs are the same as on one device, and that all processes end together.
"""

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
from jaxtml.session.library import Model
from jaxtml.session.records import SlotInput, SlotOutput
from jaxtml.session.slots import Slots
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from tests.serve.serving import Client

MESH = MeshShape(data=2, expert=4)


def run_sessions(slots: Slots, waves: list[np.ndarray]) -> list[dict[int, SlotOutput]]:
    """Runs one session per wave and returns the outputs, micro-turn by micro-turn.

    The first session begins and ends first.
    """
    streams, outputs = [DmelStream() for _ in waves], []
    for index in range(len(waves[0]) // MICRO_TURN_SAMPLES):
        if index == 0:
            slots.begin(0, 7, 0)
        if index == 3:
            for session in range(1, len(waves)):
                slots.begin(session, session, 0)
        if index == 10:
            slots.end(0)
        inputs = {}
        for session in slots.live:
            samples = slice(index * MICRO_TURN_SAMPLES, (index + 1) * MICRO_TURN_SAMPLES)
            streams[session], bins = streams[session].step(waves[session][samples])
            inputs[session] = SlotInput(bins)
        outputs.append(slots.step(inputs))
    return outputs


@pytest.fixture(scope="module")
def shared(checkpoint, tmp_path_factory) -> Path:
    """Returns a checkpoint of the small model. In its config the devices of axis `expert` share each session."""
    config, params = read_checkpoint(checkpoint)
    config = dataclasses.replace(config, serve=dataclasses.replace(config.serve, transport="replicated"))
    folder = tmp_path_factory.mktemp("shared") / "ck"
    save_checkpoint(folder, config, params, tokenizer_path=checkpoint / "tokenizer.json")
    return folder


def test_sessions_on_a_mesh_match_those_of_one_device(shared, slots, wave):
    waves = [np.roll(wave, 999 * n) for n in range(3)]
    on_mesh = Slots(Engine.load(shared, MESH), 4, (1,))
    assert on_mesh.buckets == (2, 4), "a bucket has the same number of sessions for each part of the mesh"
    on_mesh_outputs, expected_outputs = run_sessions(on_mesh, waves), run_sessions(slots, waves)
    assert on_mesh.bucket == 4
    assert any(output.speaking for outputs in expected_outputs for output in outputs.values()), (
        "no session speaks, so this would compare only silence"
    )
    for outputs, expected in zip(on_mesh_outputs, expected_outputs, strict=True):
        assert outputs.keys() == expected.keys()
        for session, output in outputs.items():
            np.testing.assert_array_equal(output.tokens, expected[session].tokens)
            np.testing.assert_allclose(output.wave, expected[session].wave, atol=1e-4)
    # A lone session of the library, as `converse --mesh` runs it, gets idle slots for the other parts of the mesh.
    alone = Model(on_mesh.engine).converse(wave[: 10 * MICRO_TURN_SAMPLES], seed=7, week_ms=0)
    for turn, expected in zip(alone.turns, expected_outputs, strict=False):
        np.testing.assert_allclose(turn.wave, expected[0].wave, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "capacity", "message"),
    [
        (MeshShape(data=3), 3, "needs 3 devices, there are 8"),
        (MeshShape(data=2, expert=4), 12, "splits the sessions into 8 equal parts, and 12 is not a multiple of 8"),
        (MeshShape(tensor=8), 8, "tensor=8 does not divide 1 kv heads"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(short_checkpoint, shape, capacity, message):
    with pytest.raises(InputError, match=message):
        Slots(Engine.load(short_checkpoint, shape), capacity)


def start_server(rank: int, port: int, checkpoint: Path, *options: str) -> subprocess.Popen[str]:
    """Starts one of the two processes of a server. Each has two devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "NNODES": "2",
        "NODE_RANK": str(rank),
    }
    all_options = [
        *("--checkpoint", str(checkpoint), "--port", "0", "--max-sessions", "4", "--mesh", "data=2,expert=2"),
        *options,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxtml", "serve", "--json", *all_options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def two_processes(
    checkpoint: Path, other: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """Yields the two processes of a server. The second one loads `other`, if given."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    both = start_server(0, port, checkpoint), start_server(1, port, other or checkpoint)
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


async def talk(
    url: str, wave: np.ndarray, micro_turns: int, first: subprocess.Popen[str], second: subprocess.Popen[str]
) -> np.ndarray:
    """Returns what a client hears from a server whose hosts are told to end meanwhile, the second host first."""
    async with aiohttp.ClientSession() as http:
        client = Client(await http.ws_connect(f"{url}/v1/live/sessions"))
        pcm = {"format": {"type": "audio/pcm", "rate": 16000}}
        await client.send("session.start", session={"model": "small_test", "audio": pcm})
        await client.until("session.started")
        sound = base64.b64encode((wave * 32767).astype("<i2").tobytes()).decode()
        await client.send("session.input_audio.append", audio=sound)
        heard = [await client.until("session.output_audio.delta") for _ in range(micro_turns)]
        second.send_signal(signal.SIGTERM)
        assert (await client.until("info"))["code"] == "going_away", (
            "a host that is told to end lets the sessions end first"
        )
        first.send_signal(signal.SIGTERM)
        heard += [await client.until("session.output_audio.delta") for _ in range(2)]
        await client.send("session.close")
        await client.until("session.closed")
        chunks = [np.frombuffer(base64.b64decode(event["delta"]), "<i2") for event in heard]
        return np.concatenate(chunks)


def test_two_processes_serve_one_model_and_end_together(short_checkpoint, wave):
    with two_processes(short_checkpoint) as (first, second):
        assert first.stdout is not None and first.stderr is not None and second.stderr is not None
        summary = json.loads(first.stdout.readline() or first.stderr.read())
        assert summary["sessions"] == 4 and summary["workers"] == 1
        heard = asyncio.run(talk(summary["url"], wave, 8, first, second))
        assert np.abs(heard).max() > 0, "the model speaks"
        assert (first.wait(30), second.wait(30)) == (0, 0)
        assert "Traceback" not in first.stderr.read() + second.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "server", "other host"])
def test_host_that_dies_takes_the_others_with_it(short_checkpoint, victim):
    with two_processes(short_checkpoint) as both:
        first, second = both
        assert first.stdout is not None and first.stderr is not None and second.stderr is not None
        assert first.stdout.readline()
        (worker,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill({"worker": int(worker), "server": first.pid, "other host": second.pid}[victim], signal.SIGKILL)
        assert first.wait(20) == (-signal.SIGKILL if victim == "server" else 1)
        assert second.wait(20) == (-signal.SIGKILL if victim == "other host" else 1)
        gone = {"worker": "the model's process", "server": "the server's process", "other host": "the model's process"}
        assert f"{gone[victim]} is gone" in first.stderr.read()
        if victim != "other host":
            assert "the first host's process is gone" in second.stderr.read()


def test_failure_on_another_host_ends_all_hosts(short_checkpoint, tmp_path):
    with two_processes(short_checkpoint, tmp_path / "missing") as (first, second):
        assert (second.wait(60), first.wait(60)) == (2, 2)
        assert first.stderr is not None and second.stderr is not None
        message = second.stderr.read().splitlines()[-1]
        assert message.startswith("jaxtml serve: ") and "missing" in message
        assert "a process of another host is gone" in (log := first.stderr.read())
        assert log.splitlines()[-1].startswith("jaxtml serve: the model's process ended with status 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "data=2", "--workers", "2"), "--mesh data=2 gives all devices to one worker: leave --workers out"),
        (("--mesh", "experts=2"), "no axis 'experts'"),
        ((), "there are several processes: say with --mesh how their devices share the model"),
    ],
)
def test_contradicting_options_are_one_line_on_stderr(options, message):
    processes = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "NNODES": "2", "NODE_RANK": "1"} if not options else {}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **processes}
    done = subprocess.run(
        [sys.executable, "-m", "jaxtml", "serve", *options], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2 and message in done.stderr.strip().splitlines()[-1]
