#!/usr/bin/env python3
"""Runs many sessions on one server at once, and measures what each simulated user hears and when.

Every session sends a recording over and over, each from a different place in the recording. It sends packets of 200 ms
at the pace of speech. Without `--url` the tool starts a server with the shipped `tiny`. With `--chaos` sessions lose
their connection and come back, stop reading for a while, and send nonsense.

The tool prints its results and writes them to `--out` as JSON and as a picture:

- gaps: the time between two pieces of sound that a session receives. A piece is 200 ms, so a longer gap is silence in
  somebody's ear.
- latency: from the end of the user's words to the arrival of the first audible sample. The end of the words is the
  time at which a person who speaks the recording would have said them, not the time at which the packet is sent.
- ticks that took longer than 200 ms, and ticks that ended late, as the server counts them.
- events lost: the server numbers the events of a session; these are the numbers that the session did not receive.

Exit status 1: a session was refused or failed, or an event was lost.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtml.checkpoint.files import SHIPPED
from jaxtml.commands.arguments import amount, count, run_tool, tool_parser
from jaxtml.errors import InputError
from jaxtml.stream.audio_file import read_audio
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.strict_json import dumps

MICRO_TURN_S = MICRO_TURN_SAMPLES / SAMPLE_RATE
AUDIBLE = 10 ** (-45 / 20)  # root mean square
PAUSE_S = 0.6  # silence that ends a user's words
PATIENCE_S = 3.0  # a reply that begins later does not count as a reply
BLOCK = SAMPLE_RATE // 100  # loudness is measured in blocks of 10 ms
STALL_S = 3.0  # with --chaos: how long a session reads nothing
FLOOD = 300  # with --chaos: messages of nonsense in a row
NONSENSE = ('{"type": 7}', "nonsense", '{"type": "session.fly"}')
CLOSE_S = 15  # within which the server closes a session after `session.close`
RECORDING = SHIPPED.parent / "demo" / "human.flac"
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def loudness(wave: np.ndarray) -> np.ndarray:
    """Returns the root mean square of each 10 ms of `wave` `[N]`."""
    return np.sqrt(np.mean(np.square(wave[: len(wave) // BLOCK * BLOCK].reshape(-1, BLOCK)), axis=1))


def ends_of_words(wave: np.ndarray) -> np.ndarray:
    """Returns the samples at which words end, where at least `PAUSE_S` of silence follows."""
    loud = np.flatnonzero(loudness(wave) > AUDIBLE)
    last = loud[np.flatnonzero(np.diff(loud, append=1 << 60) > PAUSE_S * 100)]
    return (last + 1) * BLOCK


@dataclass
class Talker:
    """One session and its measurements. Times are of the monotonic clock, in seconds.

    Attributes:
      url: the server.
      wave: what the user says in one round, `[N]` float32 at 16 kHz.
      seconds: length of the session.
      chaos: decides when and how the session misbehaves; None: the session does not misbehave.
      gaps, latencies: see the module's docstring.
      unanswered: user turns without a reply within `PATIENCE_S`.
      lost: events that the session did not receive.
      resumed: how often the session came back.
      refused: the server's error code at the start; empty: the session was admitted.
      failed: the exception that ended the session; empty: none.
    """

    url: str
    wave: np.ndarray
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
        """Runs the session from its start to its end."""
        self.last_event, self.audible, self.spoken, self.began = 0, [], [], 0.0
        ws = await http.ws_connect(f"{self.url}/v1/live/sessions", max_msg_size=0)
        audio = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE}}
        settings = {"model": await self._model_name(http), "audio": audio}
        await ws.send_json({"type": "session.start", "session": settings})
        first = await ws.receive_json()
        if first["type"] == "error":
            self.refused = first["error"]["code"]
            return
        self.session, self.last_event = first["session"], first["sequence_number"]
        self.began, self.sent, self.last_sound = monotonic(), 0, None
        while (left := self.began + self.seconds - monotonic()) > 0:
            part = min(left, self.chaos.uniform(5, 25)) if self.chaos else left
            await self._talk_for(ws, part)
            if self.chaos and part < left:
                ws = await self._misbehave(http, ws, self.chaos)
        await ws.send_json({"type": "session.close"})
        async with asyncio.timeout(CLOSE_S):
            await self._receive(ws)
        self._measure_latencies()

    async def _model_name(self, http: aiohttp.ClientSession) -> str:
        async with http.get(f"{self.url}/v1/models") as models:
            return (await models.json())["data"][0]["id"]

    async def _talk_for(self, ws: aiohttp.ClientWebSocketResponse, seconds: float) -> None:
        receiving = asyncio.create_task(self._receive(ws))
        sending = asyncio.create_task(self._send(ws, monotonic() + seconds))
        await asyncio.wait([receiving, sending], return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, receiving):
            task.cancel()
        for result in await asyncio.gather(sending, receiving, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _send(self, ws: aiohttp.ClientWebSocketResponse, until: float) -> None:
        """Sends packets at the pace of speech and notes when words end."""
        ends = ends_of_words(self.wave)
        while monotonic() < until:
            await asyncio.sleep(self.began + (self.sent + 1) * MICRO_TURN_S - monotonic())
            start = self.sent * MICRO_TURN_SAMPLES % len(self.wave)
            packet = np.take(self.wave, range(start, start + MICRO_TURN_SAMPLES), mode="wrap")
            data = base64.b64encode((packet * 32767).astype("<i2").tobytes()).decode()
            await ws.send_json({"type": "session.input_audio.append", "audio": data})
            offsets = (ends - start) % len(self.wave)
            offsets = offsets[offsets < MICRO_TURN_SAMPLES]
            self.spoken += list(self.began + self.sent * MICRO_TURN_S + offsets / SAMPLE_RATE)
            self.sent += 1

    async def _receive(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        async for message in ws:
            event = json.loads(message.data)
            if "sequence_number" in event:
                self.lost += event["sequence_number"] - self.last_event - 1
                self.last_event = event["sequence_number"]
            if event["type"] == "session.output_audio.delta":
                self._note_sound(np.frombuffer(base64.b64decode(event["delta"]), "<i2") / 32768)
            elif event["type"] == "session.closed":
                return
        raise ConnectionError(f"closed with {ws.close_code}")

    def _note_sound(self, sound: np.ndarray) -> None:
        now = monotonic()
        if self.last_sound is not None:
            self.gaps.append(now - self.last_sound)
        self.last_sound = now
        self.audible += [now + block * BLOCK / SAMPLE_RATE for block in np.flatnonzero(loudness(sound) > AUDIBLE)]

    def _measure_latencies(self) -> None:
        """Measures the latency after each end of the user's words. Words that end while the model speaks are left
        out."""
        audible = np.array(self.audible)
        for spoken in self.spoken:
            after = audible[audible > spoken - MICRO_TURN_S]
            if spoken > self.began + self.sent * MICRO_TURN_S - PATIENCE_S:
                return
            if not len(after) or after[0] > spoken + PATIENCE_S:
                self.unanswered += 1
            elif after[0] > spoken:
                self.latencies.append(float(after[0] - spoken))

    async def _misbehave(
        self, http: aiohttp.ClientSession, ws: aiohttp.ClientWebSocketResponse, chaos: random.Random
    ) -> aiohttp.ClientWebSocketResponse:
        """Cuts the connection, stalls or floods. Returns the connection on which the session goes on."""
        kind = chaos.choice(("cut", "stall", "flood"))
        if kind == "stall":
            await asyncio.sleep(STALL_S)
        elif kind == "flood":
            for _ in range(FLOOD):
                await ws.send_str(chaos.choice(NONSENSE))
        else:
            assert ws._response.connection is not None and ws._response.connection.transport is not None
            ws._response.connection.transport.abort()
            await asyncio.sleep(chaos.uniform(0.5, 5))
            ws = await self._resume(http)
        # The user goes on from here with the next packet of the recording, as if no time had passed.
        self.began, self.last_sound = monotonic() - self.sent * MICRO_TURN_S, None
        return ws

    async def _resume(self, http: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        name, token = self.session["id"], self.session["resume"]["token"]
        ws = await http.ws_connect(f"{self.url}/v1/live/sessions?session_id={name}", max_msg_size=0)
        resume = {"session_id": name, "resume_token": token, "after": self.last_event}
        await ws.send_json({"type": "session.resume", **resume})
        event = await ws.receive_json()
        if event["type"] != "session.resumed":
            raise ConnectionError(event["error"]["code"])
        self.resumed += 1
        return ws


async def read_metrics(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Returns the server's metrics by name and labels."""
    async with http.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def run_sessions(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """Runs all sessions and returns the report. The ticks of the first `--ramp` seconds are not counted."""
    wave = read_audio(args.wav)
    places = random.Random(args.seed)
    talkers = []
    for number in range(args.sessions):
        chaos = random.Random(args.seed + number) if args.chaos else None
        talkers.append(Talker(url, np.roll(wave, -places.randrange(len(wave))), args.seconds, chaos))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def start(number: int, talker: Talker) -> None:
            await asyncio.sleep(args.ramp * number / args.sessions)
            try:
                await talker.talk(http)
            except Exception as error:
                talker.failed = f"{type(error).__name__}: {error}"

        tasks = [asyncio.create_task(start(number, talker)) for number, talker in enumerate(talkers)]
        await asyncio.sleep(args.ramp)
        before = await read_metrics(http, url)
        await asyncio.wait(tasks)
        after = await read_metrics(http, url)
    return report(args, talkers, {name: after[name] - before.get(name, 0.0) for name in after}, after)


def report(
    args: argparse.Namespace, talkers: list[Talker], growth: dict[str, float], metrics: dict[str, float]
) -> dict[str, Any]:
    """Returns the report. `growth` is how much each metric grew during the run.

    Entries whose names begin with "_" are for the picture only.
    """
    gaps, latencies = (np.array([x for t in talkers for x in getattr(t, name)]) for name in ("gaps", "latencies"))
    ticks = growth["duplex_tick_duration_seconds_count"]
    return {
        "sessions": args.sessions,
        "seconds": args.seconds,
        "chaos": args.chaos,
        "refused": sum(bool(t.refused) for t in talkers),
        "failed": sum(bool(t.failed) for t in talkers),
        "failures": sorted({t.failed for t in talkers if t.failed}),
        "resumed": sum(t.resumed for t in talkers),
        "events_lost": sum(t.lost for t in talkers),
        "ticks": int(ticks),
        "tick_over_200_ms": (ticks - growth['duplex_tick_duration_seconds_bucket{le="0.2"}']) / max(ticks, 1),
        "tick_mean_s": growth["duplex_tick_duration_seconds_sum"] / max(ticks, 1),
        "step_mean_s": growth["duplex_step_duration_seconds_sum"] / max(ticks, 1),
        "tick_below_s": {
            float(edge): growth[name] / max(ticks, 1)
            for name in growth
            for edge in re.findall(r'^duplex_tick_duration_seconds_bucket{le="([\d.]+)"}$', name)
        },
        "deadline_misses": int(growth["duplex_deadline_miss_total"]),
        "ticks_lost": int(growth["duplex_ticks_lost_total"]),
        "compilations": int(metrics["duplex_compilations_total"]),
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


def show(found: dict[str, Any]) -> None:
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


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the histograms of gaps and latencies as a picture."""
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
def server(args: argparse.Namespace) -> Iterator[str]:
    """Yields the URL of the server: the one that `--url` names, or one that is started here and ended afterwards."""
    if args.url:
        yield args.url
        return
    command = [sys.executable, "-m", "jaxtml", "serve", "--json", "--port", "0", "--max-sessions", str(args.sessions)]
    process = subprocess.Popen([*command, "--drain-seconds", "2", *args.serve], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise InputError("the server did not start; its own message is above")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait()


def load(args: argparse.Namespace) -> int:
    if not Path(args.wav).is_file():
        raise InputError(f"no recording {args.wav}: give the path of a sound file")
    args.out.mkdir(parents=True, exist_ok=True)
    with server(args) as url:
        os.nice(10)  # The clients run on the server's machine; they should not take the server's time.
        gc.freeze()
        try:
            found = asyncio.run(run_sessions(args, url))
        except aiohttp.ClientError as error:
            raise InputError(f"{url}: {error}") from error
    draw(found, args.out / "loadtest.png")
    values = {name: value for name, value in found.items() if not name.startswith("_")}
    (args.out / "loadtest.json").write_text(dumps(values, indent=2))
    show(found)
    return int(found["refused"] + found["failed"] + found["events_lost"] > 0)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/load.py --sessions 4 --seconds 20 --chaos")
    parser.add_argument("--sessions", type=count, default=24, help="sessions at the same time (default: 24)")
    parser.add_argument("--seconds", type=amount, default=60, help="length of each session (default: 60)")
    parser.add_argument("--ramp", type=amount, default=5, help="seconds within which all sessions begin (default: 5)")
    parser.add_argument("--chaos", action="store_true", help="sessions misbehave, as described above")
    parser.add_argument("--url", help="a running server, as http://127.0.0.1:8080; default: one is started")
    parser.add_argument("--wav", default=RECORDING, help="what the users say; default: the demo's recording")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting places and of --chaos (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/loadtest"), metavar="DIR", help="default: out/loadtest")
    parser.add_argument("serve", nargs="*", help="arguments for `jaxtml serve`, after --")
    run_tool(parser, load)
