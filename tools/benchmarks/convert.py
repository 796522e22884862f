#!/usr/bin/env python3
"""Compares the time and memory of `jaxtml convert` with those of `cp`.

The benchmark writes a random mixture-of-experts checkpoint in the released format. Then it repeats `--pairs` times:
copy the checkpoint with `cp`, convert it to our format, and convert the result back. The files are taken out of the
page cache before each step. The benchmark ends with an error if the files that are converted back differ from the
original files.

How to read the result:

- A conversion ends when its result is on the disk. The matching figure for `cp` therefore includes `sync`; the time of
  `cp` alone is printed beside it.
- Times are of whole processes. They include two seconds in which Python and JAX start.
- Memory is the largest amount of anonymous memory (mapped files excluded) of the converting process, minus the amount
  that the process has when its modules are loaded.

Linux only: the page cache and the memory are reached through Linux interfaces.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console

from jaxtml import config as configs
from jaxtml.checkpoint.inkling.sink import released_dtypes
from jaxtml.checkpoint.source import Index, index_shape, spec_table
from jaxtml.commands.arguments import amount, count, run_tool, tool_parser
from jaxtml.config import Config
from jaxtml.convert.conversion import write_checkpoint
from jaxtml.strict_json import dumps

N_EXPERTS, D_MODEL, D_FF_EXPERT = 64, 1024, 512
LAYER_BYTES = N_EXPERTS * 3 * D_MODEL * D_FF_EXPERT * 2  # of a layer's experts in bfloat16; other parts are small
POLL_S = 0.01  # between two looks at the memory of the converting process


class RandomSource:
    """A `ParameterSource` of random numbers. The same part of the same parameter always has the same numbers."""

    def __init__(self, config: Config):
        self.config, self.specs = config, spec_table(config)
        self.dtypes = dict.fromkeys(self.specs, np.dtype(ml_dtypes.bfloat16)) | released_dtypes(config, "bfloat16")

    def dtype(self, path: str) -> np.dtype:
        return self.dtypes[path]

    def holds(self, path: str) -> bool:
        return True

    def read(self, path: str, index: Index) -> np.ndarray:
        shape = index_shape(index, self.specs[path].shape)
        rng = np.random.default_rng([len(path), *(cut.start or 0 for cut in index)])
        if self.dtypes[path].itemsize == 4:
            return rng.normal(size=shape).astype(np.float32)
        # Random signs and fractions, with exponents that give magnitudes from 2^-16 to 1.
        bits = rng.integers(0, 2**16, shape, np.uint16)
        return ((bits & 0x87FF) | 0x3800).view(ml_dtypes.bfloat16)


def write_random_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes a checkpoint with `gigabytes` of routed experts in the released format. Returns its size in bytes."""
    layers = max(2, round(gigabytes * 1e9 / LAYER_BYTES) + 1)
    settings = (
        *("backbone.vocab_size=4096", "backbone.unpadded_vocab_size=4000", "duplex.control_base=4000"),
        *(f"backbone.d_model={D_MODEL}", "backbone.d_ff_dense=4096", f"backbone.d_ff_expert={D_FF_EXPERT}"),
        *(f"backbone.n_experts={N_EXPERTS}", f"backbone.n_layers={layers}", "backbone.n_dense=1"),
        f"backbone.global_layers={list(range(5, layers, 6))}",
    )
    write_checkpoint(RandomSource(configs.load("inkling_small", settings)), folder, "random", "hf")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_from_page_cache(folder: Path) -> None:
    """Takes the files of `folder` out of the page cache."""
    os.sync()  # The kernel keeps pages that are not on the disk yet.
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes(pid: int) -> int:
    """Returns the anonymous resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def convert(source: Path, destination: Path, to: str) -> tuple[float, float]:
    """Runs `jaxtml convert`. Returns the seconds of the whole process, and the bytes of memory that it added."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxtml", "convert", str(source), str(destination), "--to", to]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        ended = threading.Event()
        samples: list[int] = []

        def watch() -> None:
            # The conversion makes this folder first. By then its modules are loaded.
            working = destination.with_name(f".{destination.name}.converting")
            while not ended.wait(POLL_S):
                with contextlib.suppress(OSError):  # the process has just ended
                    if samples or working.exists():
                        samples.append(anonymous_bytes(child.pid))

        thread = threading.Thread(target=watch)
        thread.start()
        _, messages = child.communicate()
        seconds = time.perf_counter() - began
        ended.set()
        thread.join()
    if child.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with status {child.returncode}: {messages}")
    return seconds, max(samples) - samples[0] if samples else 0


def copy_file(source: str, destination: str) -> None:
    subprocess.run(["cp", source, destination], check=True)


def measure_pair(folder: Path) -> dict[str, float]:
    """Copies and converts `folder`/hf once, then deletes the files made. Returns seconds, and bytes of added memory."""
    original = folder / "hf"
    drop_from_page_cache(original)
    began = time.perf_counter()
    shutil.copytree(original, folder / "copy", copy_function=copy_file)
    row = {"cp_s": time.perf_counter() - began}
    subprocess.run(["sync"], check=True)
    row["synced_s"] = time.perf_counter() - began
    drop_from_page_cache(original)
    row["orbax_s"], row["orbax_bytes"] = convert(original, folder / "ours", "orbax")
    drop_from_page_cache(folder / "ours")
    row["hf_s"], row["hf_bytes"] = convert(folder / "ours", folder / "back", "hf")
    for file in original.glob("*.safetensors"):
        if (folder / "back" / file.name).read_bytes() != file.read_bytes():
            raise SystemExit(f"{file.name} differs from the original after it was converted to our format and back")
    for made in ("copy", "ours", "back"):
        shutil.rmtree(folder / made)
    return row


def sentence(row: dict[str, float]) -> str:
    """Returns one measured row as a line of text."""

    def direction(to: str) -> str:
        seconds, added = row[f"{to}_s"], row[f"{to}_bytes"] / 1e9
        ratios = f"{seconds / row['synced_s']:.2f} x, {seconds / row['cp_s']:.2f} x cp alone"
        return f"{seconds:.2f} s ({ratios}), +{added:.2f} GB"

    copied = f"cp {row['cp_s']:.2f} s, with sync {row['synced_s']:.2f} s"
    return f"{copied}; to ours {direction('orbax')}; back {direction('hf')}"


def benchmark(args: argparse.Namespace) -> None:
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_random_checkpoint(folder / "hf", args.gigabytes)
        rows: list[dict[str, float]] = []
        for _ in range(args.pairs):
            rows.append(measure_pair(folder))
            console.print(sentence(rows[-1]))
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    print(dumps({"bytes": size, **medians}) if args.json else f"{size / 1e9:.2f} GB, medians: {sentence(medians)}")


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/convert.py --pairs 1 --gigabytes 0.3")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to work; default: the system's temporary one")
    parser.add_argument("--pairs", type=count, default=5, help="repetitions (default: 5)")
    parser.add_argument("--gigabytes", type=amount, default=8, help="size of the routed experts (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, benchmark)
