#!/usr/bin/env python3
"""What a session costs on this machine: from process start to the first micro-turn, and each step of a conversation.

    tools/benchmarks/session_latency.py [--checkpoint DIR] [--json]

Start: whole processes of `jaxtml converse` over 200 ms of sound, with an empty compilation cache and then with the one
that it left. Steps: one session over the demo's recording, as fast as it goes; the first is left out, it waits for the
transfer of the parameters.
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

from jaxtml.stream.audio_file import write_wav
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

RECORDING = Path(__file__).parents[2] / "jaxtml" / "assets" / "demo" / "human.flac"
WARM_RUNS = 3


def converse(folder: Path, recording: Path, checkpoint: str | None) -> float:
    """Seconds of a whole process; its compilation cache and its events stay in `folder`."""
    command = [sys.executable, "-m", "jaxtml", "converse", "--in", str(recording), "--json"]
    command += ["--out", str(folder / "reply.wav"), "--events", str(folder / "events.jsonl")]
    command += ["--checkpoint", checkpoint] if checkpoint else []
    began = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")},
    )
    return time.perf_counter() - began


def measured(checkpoint: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_wav(folder / "short.wav", np.zeros((MICRO_TURN_SAMPLES, 1), np.float32))
        cold = converse(folder, folder / "short.wav", checkpoint)
        warm = [converse(folder, folder / "short.wav", checkpoint) for _ in range(WARM_RUNS)]
        converse(folder, RECORDING, checkpoint)
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()][1:]
    steps = [event["step_ms"] for event in events]
    speaking = [event["step_ms"] for event in events if event["gate"] == "speak"]
    return {
        "first_turn_cold_s": round(cold, 2),
        "first_turn_warm_s": round(statistics.median(warm), 2),
        "step_ms_median": round(statistics.median(steps), 2),
        "step_ms_speaking_median": round(statistics.median(speaking), 2) if speaking else 0.0,
        "step_ms_worst": round(max(steps), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint directory (default: the shipped tiny)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    result = measured(args.checkpoint)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            Console().print(f"{key:24} {value:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
