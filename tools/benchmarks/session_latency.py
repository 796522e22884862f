#!/usr/bin/env python3
"""Measures what one session costs on this machine: the time to the first micro-turn, and the time of each step.

The start is measured on whole processes of `jaxtml converse` over 200 ms of sound: once with an empty compilation
cache ("cold"), then with the cache that the cold process left ("warm"; the median of three). The steps are those of
one session over the demo's recording, as fast as it goes. The first step is left out, because it waits until the
parameters are on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxtml.commands.arguments import add_checkpoint, add_recording, count, run_tool, tool_parser
from jaxtml.errors import InputError
from jaxtml.stream.audio_file import write_wav
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.strict_json import dumps


def converse(folder: Path, recording: Path, checkpoint: Path | str) -> float:
    """Runs `jaxtml converse` and returns the seconds of the whole process.

    The process keeps its compilation cache, its reply and its events in `folder`.
    """
    command = [sys.executable, "-m", "jaxtml", "converse", "--in", str(recording), "--json"]
    command += ["--checkpoint", str(checkpoint)]
    command += ["--out", str(folder / "reply.wav"), "--events", str(folder / "events.jsonl")]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    began = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    if process.returncode:
        raise InputError(f"`jaxtml converse` failed: {process.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - began


def measure(checkpoint: Path | str, recording: Path, warm_runs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = folder / "short.wav"
        write_wav(short, np.zeros((MICRO_TURN_SAMPLES, 1), np.float32))
        cold = converse(folder, short, checkpoint)
        warm = [converse(folder, short, checkpoint) for _ in range(warm_runs)]
        converse(folder, recording, checkpoint)
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()][1:]
    if not events:
        raise InputError(f"{recording} has one micro-turn: give a recording of more than 200 ms")
    steps = [event["step_ms"] for event in events]
    speaking = [event["step_ms"] for event in events if event["gate"] == "speak"]
    return {
        "first_turn_cold_s": round(cold, 2),
        "first_turn_warm_s": round(statistics.median(warm), 2),
        "step_ms_median": round(statistics.median(steps), 2),
        "step_ms_speaking_median": round(statistics.median(speaking), 2) if speaking else 0.0,
        "step_ms_worst": round(max(steps), 2),
    }


def benchmark(args: argparse.Namespace) -> None:
    result = measure(args.checkpoint, args.recording, args.warm_runs)
    if args.json:
        print(dumps(result))
        return
    for name, value in result.items():
        Console().print(f"{name:24} {value:8.2f}")


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/session_latency.py --warm-runs 1")
    add_checkpoint(parser)
    add_recording(parser, "what the user says")
    parser.add_argument("--warm-runs", type=count, default=3, help="starts with a warm cache (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, benchmark)
