#!/usr/bin/env python3
"""Many people talk to one server at once: what they get, and when.

    tools/benchmarks/load.py [--sessions 24] [--seconds 60] [--ramp 5] [--chaos] [--url URL] [--out DIR]

Every session sends a recording over and over, from a place of its own, in packets of 200 ms at the pace at which it was
spoken, and plays what comes. Without --url the server is started here, with the shipped `tiny`. With --chaos, sessions
are cut off and come back, stop taking what they are sent, and send nonsense. Printed, and written as JSON and picture:

- gaps between two pieces of sound that a session gets (200 ms each; longer ones are silence in somebody's ear),
- latency, from the end of the user's words as they are spoken to the first audible sample, as it arrives,
- ticks that took longer than 200 ms, and those that ended late, as the server counts them,
- events that were lost: numbers of events that a session did not get.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

TURN_S = MICRO_TURN_SAMPLES / SAMPLE_RATE
AUDIBLE = 10 ** (-45 / 20)
PAUSE_S, PATIENCE_S = 0.6, 3.0  # silence that ends a user's words; for how long an answer to them is waited for
WINDOW = SAMPLE_RATE // 100
DEMO = Path(SHIPPED).parent / "demo" / "human.flac"


def ends(wave: np.ndarray) -> np.ndarray:
    """Samples at which words end that `PAUSE_S` of silence follow."""
    loud = np.flatnonzero(level(wave) > AUDIBLE)
    last = loud[np.flatnonzero(np.diff(loud, append=1 << 60) > PAUSE_S * 100)]
    return (last + 1) * WINDOW


def level(wave: np.ndarray) -> np.ndarray:
    """Root mean square of each 10 ms."""
    return np.sqrt(np.mean(np.square(wave[: len(wave) // WINDOW * WINDOW].reshape(-1, WINDOW)), axis=1))


@dataclass
class Talker:
    """One session, and what came of it. Times are of the monotonic clock."""

    url: str
    wave: np.ndarray  # of one round, from where this session begins
    seconds: float
    chaos: random.Random | None
    gaps: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    unanswered: int = 0
    lost: int = 0
    resumed: int = 0
    refused: str = ""
    failed: str = ""

    async def talk(self, http: aiohttp.ClientSession) -> None:
        """From its start to its end."""
        self.number, self.audible, self.spoken, self.began = 0, [], [], 0.0
        ws = await http.ws_connect(f"{self.url}/v1/live/sessions", max_msg_size=0)
        model = {"model": await self._model(http), "audio": {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}}}
        await ws.send_json({"type": "session.start", "session": model})
        first = await ws.receive_json()
        if first["type"] == "error":
            self.refused = first["error"]["code"]
            return
        self.session, self.number = first["session"], first["sequence_number"]
        self.began, self.sent, self.heard_at = time.monotonic(), 0, None
        while (left := self.began + self.seconds - time.monotonic()) > 0:
            part = min(left, self.chaos.uniform(5, 25)) if self.chaos else left
            await self._part(ws, part)
            if self.chaos and part < left:
                ws = await self._mischief(http, ws)
        await ws.send_json({"type": "session.close"})
        async with asyncio.timeout(15):
            await self._listen(ws)
        self._answered()

    async def _model(self, http: aiohttp.ClientSession) -> str:
        async with http.get(f"{self.url}/v1/models") as models:
            return (await models.json())["data"][0]["id"]

    async def _part(self, ws: aiohttp.ClientWebSocketResponse, seconds: float) -> None:
        listening = asyncio.create_task(self._listen(ws))
        speaking = asyncio.create_task(self._speak(ws, time.monotonic() + seconds))
        await asyncio.wait([listening, speaking], return_when=asyncio.FIRST_COMPLETED)
        for task in (speaking, listening):
            task.cancel()
        for result in await asyncio.gather(speaking, listening, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _speak(self, ws: aiohttp.ClientWebSocketResponse, until: float) -> None:
        pauses = ends(self.wave)
        while time.monotonic() < until:
            await asyncio.sleep(self.began + (self.sent + 1) * TURN_S - time.monotonic())
            at = self.sent * MICRO_TURN_SAMPLES % len(self.wave)
            packet = np.take(self.wave, range(at, at + MICRO_TURN_SAMPLES), mode="wrap")
            data = base64.b64encode((packet * 32767).astype("<i2").tobytes()).decode()
            await ws.send_json({"type": "session.input_audio.append", "audio": data})
            after = (pauses - at) % len(self.wave)
            self.spoken += list(self.began + self.sent * TURN_S + after[after < MICRO_TURN_SAMPLES] / SAMPLE_RATE)
            self.sent += 1

    async def _listen(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        async for message in ws:
            event = json.loads(message.data)
            if "sequence_number" in event:
                self.lost += event["sequence_number"] - self.number - 1
                self.number = event["sequence_number"]
            if event["type"] == "session.output_audio.delta":
                self._played(np.frombuffer(base64.b64decode(event["delta"]), "<i2") / 32768)
            elif event["type"] == "session.closed":
                return
        raise ConnectionError(f"closed with {ws.close_code}")

    def _played(self, sound: np.ndarray) -> None:
        now = time.monotonic()
        if self.heard_at is not None:
            self.gaps.append(now - self.heard_at)
        self.heard_at = now
        self.audible += [now + at * WINDOW / SAMPLE_RATE for at in np.flatnonzero(level(sound) > AUDIBLE)]

    def _answered(self) -> None:
        """Latencies: from each end of words to what is first audible, if nothing was at that time."""
        audible = np.array(self.audible)
        for spoken in self.spoken:
            after = audible[audible > spoken - 0.2]
            if spoken > self.began + self.sent * TURN_S - PATIENCE_S:
                return
            if not len(after) or after[0] > spoken + PATIENCE_S:
                self.unanswered += 1
            elif after[0] > spoken:
                self.latencies.append(float(after[0] - spoken))

    async def _mischief(
        self, http: aiohttp.ClientSession, ws: aiohttp.ClientWebSocketResponse
    ) -> aiohttp.ClientWebSocketResponse:
        assert self.chaos is not None
        kind = self.chaos.choice(("cut", "stall", "flood"))
        if kind == "stall":
            await asyncio.sleep(3)
        elif kind == "flood":
            for _ in range(300):
                await ws.send_str(self.chaos.choice(('{"type": 7}', "nonsense", '{"type": "session.fly"}')))
        else:
            assert ws._response.connection is not None and ws._response.connection.transport is not None
            ws._response.connection.transport.abort()
            await asyncio.sleep(self.chaos.uniform(0.5, 5))
            again = f"{self.url}/v1/live/sessions?session_id={self.session['id']}"
            ws = await http.ws_connect(again, max_msg_size=0)
            token = self.session["resume"]["token"]
            resume = {"session_id": self.session["id"], "resume_token": token, "after": self.number}
            await ws.send_json({"type": "session.resume", **resume})
            event = await ws.receive_json()
            if event["type"] != "session.resumed":
                raise ConnectionError(event["error"]["code"])
            self.resumed += 1
        # The conversation goes on now: what would have been said meanwhile never was.
        self.began, self.heard_at = time.monotonic() - self.sent * TURN_S, None
        return ws


async def measure(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The server's metrics."""
    async with http.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def load(args: argparse.Namespace, url: str) -> dict:
    wave = read_audio(args.wav)
    drawn = random.Random(args.seed)
    talkers = []
    for n in range(args.sessions):
        chaos = random.Random(args.seed + n) if args.chaos else None
        talkers.append(Talker(url, np.roll(wave, -drawn.randrange(len(wave))), args.seconds, chaos))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def one(n: int, talker: Talker) -> None:
            await asyncio.sleep(args.ramp * n / args.sessions)
            try:
                await talker.talk(http)
            except Exception as error:
                talker.failed = f"{type(error).__name__}: {error}"

        tasks = [asyncio.create_task(one(n, talker)) for n, talker in enumerate(talkers)]
        await asyncio.sleep(args.ramp)
        before = await measure(http, url)
        await asyncio.wait(tasks)
        after = await measure(http, url)
    return report(args, talkers, {name: after[name] - before.get(name, 0.0) for name in after}, after)


def report(args: argparse.Namespace, talkers: list[Talker], grown: dict[str, float], now: dict[str, float]) -> dict:
    gaps, latencies = (np.array([x for t in talkers for x in getattr(t, name)]) for name in ("gaps", "latencies"))
    ticks = grown["duplex_tick_duration_seconds_count"]
    failed = sorted({t.failed for t in talkers if t.failed})
    return {
        "sessions": args.sessions,
        "seconds": args.seconds,
        "chaos": args.chaos,
        "refused": sum(bool(t.refused) for t in talkers),
        "failed": sum(bool(t.failed) for t in talkers),
        "failures": failed,
        "resumed": sum(t.resumed for t in talkers),
        "events_lost": sum(t.lost for t in talkers),
        "ticks": int(ticks),
        "tick_over_200_ms": (ticks - grown['duplex_tick_duration_seconds_bucket{le="0.2"}']) / max(ticks, 1),
        "tick_mean_s": grown["duplex_tick_duration_seconds_sum"] / max(ticks, 1),
        "step_mean_s": grown["duplex_step_duration_seconds_sum"] / max(ticks, 1),
        "tick_below_s": {
            float(edge): grown[name] / max(ticks, 1)
            for name in grown
            for edge in re.findall(r'^duplex_tick_duration_seconds_bucket{le="([\d.]+)"}$', name)
        },
        "deadline_misses": int(grown["duplex_deadline_miss_total"]),
        "ticks_lost": int(grown["duplex_ticks_lost_total"]),
        "compilations": int(now["duplex_compilations_total"]),
        "gap_s": quantiles(gaps),
        "latency_s": quantiles(latencies),
        "answered": len(latencies),
        "unanswered": sum(t.unanswered for t in talkers),
        "_gaps": gaps,
        "_latencies": latencies,
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {name: round(float(np.quantile(values, q)), 4) for name, q in QUANTILES.items()}


QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def show(found: dict) -> None:
    console = Console()
    table = Table(title=f"{found['sessions']} sessions, {found['seconds']:.0f} s")
    table.add_column("")
    for name in QUANTILES:
        table.add_column(name, justify="right")
    for name in ("gap_s", "latency_s"):
        table.add_row(name, *(f"{value:.3f}" for value in found[name].values()))
    console.print(table)
    for name, value in found.items():
        if not name.startswith("_") and not isinstance(value, dict):
            console.print(f"{name:18} {value:.4f}" if isinstance(value, float) else f"{name:18} {value}")


def draw(found: dict, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axes, name, limit in ((left, "_gaps", 0.6), (right, "_latencies", PATIENCE_S)):
        axes.hist(np.clip(found[name], 0, limit), bins=60, range=(0, limit), color="0.3")
        axes.set_xlabel("s")
    left.set_yscale("log")
    left.set_title("between two pieces of sound")
    right.set_title("from the user's last word to the first sample")
    figure.savefig(path, dpi=120)


@contextmanager
def server(args: argparse.Namespace):
    """The URL of one that runs; one started here is ended."""
    if args.url:
        yield args.url
        return
    command = [sys.executable, "-m", "jaxtml", "serve", "--json", "--port", "0", "--max-sessions", str(args.sessions)]
    process = subprocess.Popen([*command, "--drain-seconds", "2", *args.serve], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ramp", type=float, default=5, help="seconds in which sessions begin, one after the other")
    parser.add_argument("--chaos", action="store_true")
    parser.add_argument("--url", help="of a running server")
    parser.add_argument("--wav", default=DEMO, help="what is said")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/loadtest"))
    parser.add_argument("serve", nargs="*", help="arguments for `jaxtml serve`, behind --")
    args = parser.parse_args()
    with server(args) as url:
        os.nice(10)  # these clients are on the server's machine, and take its time
        gc.freeze()
        found = asyncio.run(load(args, url))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(found, args.out / "loadtest.png")
    (args.out / "loadtest.json").write_text(
        json.dumps({name: value for name, value in found.items() if not name.startswith("_")}, indent=2)
    )
    show(found)
    raise SystemExit(found["refused"] + found["failed"] + found["events_lost"] > 0)


if __name__ == "__main__":
    main()
