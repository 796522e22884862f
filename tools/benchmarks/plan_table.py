#!/usr/bin/env python3
"""The README's table of plans: `jaxtml plan` of the 276B model for pods that are not here, one after the other.

    tools/benchmarks/plan_table.py [ROW ...] [--json]

Needs the compilers: `pip install -e .[plan]`, for H100 also `.[plan-cuda]`; half an hour on two cores for all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from rich.console import Console

CONFIG = "tml_interaction_small"
TRAIN = ("--program", "train", "--topology", "v5p:4x4x8", "--mesh", "data=16,expert=8", "--set", "train.batch=128",
         "--set", "train.capacity=1.1", "--set", "train.transport=ragged")  # fmt: skip
BFLOAT16 = ("--set", "train.param_dtype=bfloat16", "--set", "train.moment_dtype=bfloat16")
ROWS: dict[str, tuple[str, ...]] = {
    "train-v5p-float32": TRAIN,
    "train-v5p-bfloat16": (*TRAIN, *BFLOAT16),
    "serve-v5p-16": ("--program", "serve", "--topology", "v5p:2x2x2", "--mesh", "expert=2,tensor=4"),
    "serve-v6e-32": ("--program", "serve", "--topology", "v6e:4x8", "--mesh", "expert=8,tensor=4"),
    "serve-v6e-16-int8": ("--program", "serve", "--topology", "v6e:4x4", "--mesh", "expert=4,tensor=4",
                          "--set", "serve.int8_experts=true"),
    "serve-tpu7x-8": ("--program", "serve", "--topology", "tpu7x:2x2x1", "--mesh", "expert=4,tensor=2"),
    "serve-h100-16": ("--program", "serve", "--topology", "h100:2x8", "--mesh", "expert=2,tensor=8"),
}  # fmt: skip


def planned(arguments: tuple[str, ...]) -> dict:
    """A plan's report with the seconds that its process took and the most memory that it held."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxtml", "plan", CONFIG, *arguments, "--json"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        if status:
            raise SystemExit(err.read()[-2000:])
        report = json.load(out)
    return report | {"plan_s": time.perf_counter() - began, "plan_bytes": usage.ru_maxrss * 1024}


def row(name: str, report: dict) -> str:
    if report["program"] == "train":
        speed = f"step {report['roofline_step_ms']:.0f} ms, {report['flops_ratio'] / (4 / 3):.3f} x ideal FLOPs"
    else:
        speed = f"micro-turn {report['turn_ms']['listening']:.0f} to {report['turn_ms']['speaking']:.0f} ms"
    parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in report["memory"].items() if size > 5e7)
    return (
        f"| {name} | {report['topology']} | {report['mesh']} | {report['bytes_per_chip'] / 1e9:.1f} of "
        f"{report['chip_memory_bytes'] / 1e9:.0f} ({parts}) | {speed} | "
        f"{report['plan_s']:.0f} s, {report['plan_bytes'] / 1e9:.1f} GB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--json", action="store_true", help="the reports as one JSON object")
    args = parser.parse_args()
    if unknown := set(args.rows) - ROWS.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    console, reports = Console(stderr=True), {}
    for name in args.rows or ROWS:
        with console.status(f"compiling {name}"):
            reports[name] = planned(ROWS[name])
        if not args.json:
            print(row(name, reports[name]), flush=True)
    if args.json:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
