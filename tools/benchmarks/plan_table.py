#!/usr/bin/env python3
"""Prints the table of plans for the 276B model: runs `jaxtml plan` for one pod after the other.

Each row is a line of a Markdown table, with the time and the memory that the plan itself took. Needs the compilers,
but no pod: `pip install -e '.[plan]'`, and for the H100 row also `pip install -e '.[plan-cuda]'`. All rows take half
an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from rich.console import Console

from jaxtml.commands.arguments import run_tool, tool_parser
from jaxtml.errors import InputError
from jaxtml.strict_json import dumps

CONFIG = "tml_interaction_small"
TRAIN = ("--program", "train", "--topology", "v5p:4x4x8", "--mesh", "data=16,expert=8", "--set", "train.batch=128",
         "--set", "train.capacity=1.1", "--set", "train.transport=ragged")  # fmt: skip
BFLOAT16 = ("--set", "train.param_dtype=bfloat16", "--set", "train.moment_dtype=bfloat16")
ROWS: dict[str, tuple[str, ...]] = {
    "train-v5p-float32": TRAIN,
    "train-v5p-bfloat16": (*TRAIN, *BFLOAT16),
    "serve-v5p-32": ("--program", "serve", "--topology", "v5p:2x2x4", "--mesh", "expert=4,tensor=4"),
    "serve-v6e-32": ("--program", "serve", "--topology", "v6e:4x8", "--mesh", "expert=8,tensor=4"),
    "serve-v6e-16-int8": ("--program", "serve", "--topology", "v6e:4x4", "--mesh", "expert=4,tensor=4",
                          "--set", "serve.int8_experts=true"),
    "serve-tpu7x-16": ("--program", "serve", "--topology", "tpu7x:2x2x2", "--mesh", "expert=4,tensor=4"),
    "serve-h100-16": ("--program", "serve", "--topology", "h100:2x8", "--mesh", "expert=2,tensor=8"),
}  # fmt: skip
MENTIONED_BYTES = 5e7  # smaller kinds of memory are left out of the row


def plan(config: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Runs `jaxtml plan` and returns its report, with the seconds and the peak memory of the process."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxtml", "plan", config, *arguments, "--slow-too", "--json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        if status:
            raise InputError((err.read().strip().splitlines() or ["`jaxtml plan` failed"])[-1])
        report = json.load(out)
    return report | {"plan_s": time.perf_counter() - began, "plan_bytes": usage.ru_maxrss * 1024}


def serving_speed(report: dict[str, Any]) -> str:
    """Returns the times of a server's micro-turns in words: without latency, and with the latency of collectives."""
    roofs, times = ([f"{report[key][name]:.0f}" for name in report["turn_ms"]]
                    for key in ("turn_ms", "turn_with_latency_ms"))  # fmt: skip
    counts = [f"{report[key]['listening']}, {report[key]['speaking']}, {report[key]['longest']}"
              for key in ("turn_passes", "turn_collectives")]  # fmt: skip
    mixed = ", ".join(f"{name} {ms:.0f}" for name, ms in report["mix_ms"].items())
    mark = "" if report["real_time"] else "**not in real time**: "
    return (
        f"{mark}listening, speaking, longest {', '.join(times)} ms (rooflines {', '.join(roofs)}; passes {counts[0]}; "
        f"collectives {counts[1]}); mix {mixed} ms"
    )


def table_row(name: str, report: dict[str, Any]) -> str:
    """Returns a report as a line of a Markdown table."""
    if report["program"] == "train":
        speed = f"step {report['roofline_step_ms']:.0f} ms, {report['flops_ratio'] / (4 / 3):.3f} x ideal FLOPs"
    else:
        speed = serving_speed(report)
    sizes = {kind: size for kind, size in report["memory"].items() if size > MENTIONED_BYTES}
    parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sizes.items())
    memory = f"{report['bytes_per_chip'] / 1e9:.1f} of {report['chip_memory_bytes'] / 1e9:.0f} ({parts})"
    cost = f"{report['plan_s']:.0f} s, {report['plan_bytes'] / 1e9:.1f} GB"
    return f"| {name} | {report['topology']} | {report['mesh']} | {memory} | {speed} | {cost} |"


def make_table(args: argparse.Namespace) -> None:
    unknown = sorted(set(args.rows) - ROWS.keys())
    if unknown:
        raise InputError(f"no row {', '.join(unknown)}: give some of {', '.join(ROWS)}")
    console, reports = Console(stderr=True), {}
    for name in args.rows or ROWS:
        with console.status(f"compiling {name}"):
            reports[name] = plan(args.config, ROWS[name])
        if not args.json:
            print(table_row(name, reports[name]), flush=True)
    if args.json:
        print(dumps(reports))


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/plan_table.py serve-h100-16 serve-v6e-32")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--config", default=CONFIG, help=f"a name in configs/, or a path (default: {CONFIG})")
    parser.add_argument("--json", action="store_true", help="print the reports as one JSON object to stdout")
    run_tool(parser, make_table)
