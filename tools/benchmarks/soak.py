#!/usr/bin/env python3
"""Whether a server stays as it was: an hour of one session, and a thousand clients that are cut off and come back.

    tools/benchmarks/soak.py [--checkpoint DIR] [--minutes 60] [--cycles 1000]

The hour runs as fast as the model does: a session of a worker hears a recording over and over. For its last tenth
another worker is there, whose session has just begun, and the two have their micro-turns in turn: what is told are the
medians of the compiled step of both, because a machine is not as fast in one minute as in another, and what memory the
old worker has after each tenth. The cycles are those of a real server, whose memory is told likewise, open files and
sessions at the end: a client begins, is cut off, comes back, hears something, and is gone for good.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.serve.runtime.wire import SessionStart, Tick
from jaxtml.serve.runtime.worker_process import WorkerProcess
from jaxtml.session.records import SlotInput
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

WARM = 3  # rounds before anything is counted
DEMO = Path(SHIPPED).parent / "demo" / "human.flac"


class Talk:
    """A session, the only one of its worker."""

    def __init__(self, link: WorkerProcess, wave: np.ndarray):
        self.link, self.wave, self.stream, self.turns = link, wave, DmelStream(), 0

    async def turn(self) -> float:
        """The next micro-turn: ms of its step."""
        at = self.turns * MICRO_TURN_SAMPLES % len(self.wave)
        self.stream, bins = self.stream.step(self.wave[at : at + MICRO_TURN_SAMPLES])
        begin = () if self.turns else (SessionStart(1, 0, 0),)
        told = await self.link.tick(Tick(begin, (), {1: SlotInput(bins)}))
        assert told.compilations == 0
        self.turns += 1
        return told.step_ms


async def hour(checkpoint: Path, minutes: float) -> dict[str, float | list[float]]:
    wave = read_audio(DEMO)
    turns = len(wave) // MICRO_TURN_SAMPLES
    wave = wave[: turns * MICRO_TURN_SAMPLES]
    rounds = max(20, round(minutes * 300 / turns))
    tenth = rounds // 10
    old = Talk(await WorkerProcess.start(checkpoint, 1), wave)
    process, memory = psutil.Process(old.link.process.pid), []
    for n in range(rounds - tenth):
        for _ in range(turns):
            await old.turn()
        if (n + 1) % tenth == 0:
            memory.append(round(process.memory_info().rss / 2**20, 1))
    new = Talk(await WorkerProcess.start(checkpoint, 1), wave)
    times = [(await old.turn(), await new.turn()) for _ in range((tenth + WARM) * turns)][WARM * turns :]
    memory.append(round(process.memory_info().rss / 2**20, 1))
    await old.link.close()
    await new.link.close()
    tail, head = np.median(np.array(times), axis=0)
    return {
        "session_minutes": old.turns / 300,
        "step_ms_of_a_new_session": round(float(head), 2),
        "step_ms_at_the_end": round(float(tail), 2),
        "end_over_new": round(float(tail / head), 3),
        "memory_mb_by_tenths": memory,
    }


async def cycle(http: aiohttp.ClientSession, url: str, model: str) -> None:
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


async def cycles(checkpoint: Path, count: int, at_a_time: int = 8) -> dict[str, object]:
    command = [sys.executable, "-m", "jaxtml", "serve", "--json", "--checkpoint", str(checkpoint), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--max-sessions", str(at_a_time)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    try:
        said = json.loads(server.stdout.readline())
        url, left = said["url"], iter(range(count))
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children()]
        memory, files = [], []

        async def one(http: aiohttp.ClientSession) -> None:
            for n in left:
                await cycle(http, url, said["model"])
                await asyncio.sleep(0.2)  # the slot is free at the next tick
                if (n + 1) % max(1, count // 10) == 0:
                    memory.append(round(sum(process.memory_info().rss for process in family) / 2**20, 1))
                    files.append(sum(process.num_fds() for process in family))

        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*(one(http) for _ in range(at_a_time // 2)))
            await asyncio.sleep(1)
            async with http.get(f"{url}/metrics") as response:
                text = await response.text()
        kept = [line for line in text.splitlines() if line.startswith(("duplex_sessions_active", "duplex_sessions_d"))]
        return {
            "cycles": count,
            "memory_mb_by_tenths": memory,
            "files_by_tenths": files,
            "sessions_left": sum(float(line.split()[1]) for line in kept),
        }
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--cycles", type=int, default=1000)
    args = parser.parse_args()
    if args.minutes:
        print(json.dumps(asyncio.run(hour(args.checkpoint, args.minutes)), indent=2), flush=True)
    if args.cycles:
        print(json.dumps(asyncio.run(cycles(args.checkpoint, args.cycles)), indent=2))


if __name__ == "__main__":
    main()
