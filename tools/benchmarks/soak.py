#!/usr/bin/env python3
"""Checks that a server neither slows down nor grows: one long session, and a thousand clients that come and go.

The long session (`--minutes`) runs as fast as the model does. One worker process has one session, which hears a
recording over and over. For the last tenth of the time a second worker runs beside it, whose session has just begun.
The two run their micro-turns in turn, because a machine is not equally fast from minute to minute. The result has the
median step of both sessions, and the memory of the first worker after each tenth.

The cycles (`--cycles`) run against a real server. In each, a client begins a session, loses its connection, comes back,
hears something, and leaves for good. The result has the memory and the open files of the server after each tenth, and
the number of sessions that are left at the end, which should be 0.

Both results are JSON on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from jaxtml.commands.arguments import add_checkpoint, add_recording, run_tool, tool_parser
from jaxtml.errors import InputError
from jaxtml.serve.runtime.wire import SessionStart, Tick
from jaxtml.serve.runtime.worker_process import WorkerProcess
from jaxtml.session.records import SlotInput
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.strict_json import dumps

MICRO_TURNS_PER_MINUTE = 60 * SAMPLE_RATE // MICRO_TURN_SAMPLES
WARM_UP_ROUNDS = 3  # rounds of both workers before their steps are counted
MIN_ROUNDS = 20  # two per tenth
CLIENTS = 4  # of the cycles, at the same time; the server admits twice as many sessions
FREE_S = 0.2  # a slot is free again at the next tick


class WorkerSession:
    """A worker with one session, which hears a recording over and over."""

    def __init__(self, worker: WorkerProcess, wave: np.ndarray):
        self.worker, self.wave, self.stream, self.micro_turns = worker, wave, DmelStream(), 0

    async def step(self) -> float:
        """Runs the next micro-turn and returns the milliseconds of its step."""
        start = self.micro_turns * MICRO_TURN_SAMPLES % len(self.wave)
        self.stream, bins = self.stream.step(self.wave[start : start + MICRO_TURN_SAMPLES])
        begin = () if self.micro_turns else (SessionStart(1, 0, 0),)
        reply = await self.worker.tick(Tick(begin, (), {1: SlotInput(bins)}))
        assert reply.compilations == 0
        self.micro_turns += 1
        return reply.step_ms


def megabytes(processes: list[psutil.Process]) -> float:
    """Returns the resident memory of the processes in MiB."""
    return round(sum(process.memory_info().rss for process in processes) / 2**20, 1)


async def run_long_session(checkpoint: Path | str, recording: Path, minutes: float) -> dict[str, float | list[float]]:
    wave = read_audio(recording)
    per_round = len(wave) // MICRO_TURN_SAMPLES
    if not per_round:
        raise InputError(f"{recording} is shorter than 200 ms: give a longer recording")
    wave = wave[: per_round * MICRO_TURN_SAMPLES]
    rounds = max(MIN_ROUNDS, round(minutes * MICRO_TURNS_PER_MINUTE / per_round))
    tenth = rounds // 10
    old = WorkerSession(await WorkerProcess.start(checkpoint, 1), wave)
    process, memory = psutil.Process(old.worker.process.pid), []
    for number in range(1, rounds - tenth + 1):
        for _ in range(per_round):
            await old.step()
        if number % tenth == 0:
            memory.append(megabytes([process]))
    new = WorkerSession(await WorkerProcess.start(checkpoint, 1), wave)
    pairs = [(await old.step(), await new.step()) for _ in range((tenth + WARM_UP_ROUNDS) * per_round)]
    memory.append(megabytes([process]))
    await old.worker.close()
    await new.worker.close()
    old_ms, new_ms = np.median(np.array(pairs[WARM_UP_ROUNDS * per_round :]), axis=0)
    return {
        "session_minutes": old.micro_turns / MICRO_TURNS_PER_MINUTE,
        "step_ms_of_a_new_session": round(float(new_ms), 2),
        "step_ms_at_the_end": round(float(old_ms), 2),
        "end_over_new": round(float(old_ms / new_ms), 3),
        "memory_mb_by_tenths": memory,
    }


async def run_cycle(http: aiohttp.ClientSession, url: str, model: str) -> None:
    """One client: begins a session, loses its connection, comes back, hears something, and leaves for good."""
    ws = await http.ws_connect(f"{url}/v1/live/sessions")
    await ws.send_json({"type": "session.start", "session": {"model": model}})
    session = (await ws.receive_json())["session"]
    assert ws._response.connection is not None and ws._response.connection.transport is not None
    ws._response.connection.transport.abort()
    ws = await http.ws_connect(f"{url}/v1/live/sessions")
    token = session["resume"]["token"]
    await ws.send_json({"type": "session.resume", "session_id": session["id"], "resume_token": token, "after": 1})
    assert (await ws.receive_json())["type"] == "session.resumed"
    while (await ws.receive_json())["type"] != "session.output_audio.delta":
        pass
    await ws.close(code=1000)


@contextmanager
def running_server(checkpoint: Path | str, sessions: int) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server of `sessions` sessions: its process, its URL and the name of its model. It is ended afterwards."""
    command = [sys.executable, "-m", "jaxtml", "serve", "--json", "--checkpoint", str(checkpoint), "--port", "0"]
    command += ["--max-sessions", str(sessions)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise InputError(f"the server did not start; see what `{' '.join(command)}` says")
        address = json.loads(line)
        yield process, address["url"], address["model"]
    finally:
        process.terminate()
        process.wait()


async def run_cycles(checkpoint: Path | str, cycles: int) -> dict[str, object]:
    clients = min(CLIENTS, cycles)
    with running_server(checkpoint, 2 * clients) as (server, url, model):
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children()]
        numbers = iter(range(1, cycles + 1))
        memory, files = [], []

        async def client(http: aiohttp.ClientSession) -> None:
            for number in numbers:
                await run_cycle(http, url, model)
                await asyncio.sleep(FREE_S)
                if number % max(1, cycles // 10) == 0:
                    memory.append(megabytes(processes))
                    files.append(sum(process.num_fds() for process in processes))

        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(client(http) for _ in range(clients)))
            await asyncio.sleep(1)
            async with http.get(f"{url}/metrics") as response:
                metrics = (await response.text()).splitlines()
    sessions = [line for line in metrics if line.startswith(("duplex_sessions_active", "duplex_sessions_d"))]
    return {
        "cycles": cycles,
        "memory_mb_by_tenths": memory,
        "files_by_tenths": files,
        "sessions_left": sum(float(line.split()[1]) for line in sessions),
    }


def soak(args: argparse.Namespace) -> None:
    if args.minutes > 0:
        result = asyncio.run(run_long_session(args.checkpoint, args.recording, args.minutes))
        print(dumps(result, indent=2), flush=True)
    if args.cycles > 0:
        print(dumps(asyncio.run(run_cycles(args.checkpoint, args.cycles)), indent=2))


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/soak.py --minutes 6 --cycles 100")
    add_checkpoint(parser)
    add_recording(parser, "what the session hears")
    parser.add_argument("--minutes", type=float, default=60, help="length of the long session; 0: none (default: 60)")
    parser.add_argument("--cycles", type=int, default=1000, help="clients that come and go; 0: none (default: 1000)")
    run_tool(parser, soak)
