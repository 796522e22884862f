#!/usr/bin/env python3
"""Time and memory of `jaxtml convert` against `cp` of the same bytes, in pairs, the files out of the page cache before.

    tools/benchmarks/convert.py [--folder DIR] [--pairs 5] [--gigabytes 8]

Makes a random mixture-of-experts checkpoint in the released format, converts it to ours and back with the command.
A conversion ends when its result is on the disk, so `cp` is followed by `sync`; both are told apart. Times are those of
whole processes, the start of Python and JAX (two seconds) included. Memory is what is anonymous (a mapped file is not)
in the converting process above what it has once its modules are loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from jaxtml.config import Config
from jaxtml.convert.conversion import write_checkpoint


class Drawn:
    """Random numbers as a source, the same for a seed."""

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
        # Any sign and fraction, exponents of numbers between 2^-16 and 1.
        bits = rng.integers(0, 2**16, shape, np.uint16)
        return ((bits & 0x87FF) | 0x3800).view(ml_dtypes.bfloat16)


def checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes one of about this size; returns its bytes."""
    layer = 64 * 3 * 1024 * 512 * 2
    layers = max(2, round(gigabytes * 1e9 / layer) + 1)
    settings = (
        *("backbone.vocab_size=4096", "backbone.unpadded_vocab_size=4000", "duplex.control_base=4000"),
        *("backbone.d_model=1024", "backbone.d_ff_dense=4096", "backbone.d_ff_expert=512", "backbone.n_experts=64"),
        *(f"backbone.n_layers={layers}", "backbone.n_dense=1", f"backbone.global_layers={list(range(5, layers, 6))}"),
    )
    write_checkpoint(Drawn(configs.load("inkling_small", settings)), folder, "random", "hf")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def forgotten(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    os.sync()  # what is not on the disk yet would stay
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def converted(source: Path, destination: Path, to: str) -> tuple[float, float]:
    """Seconds of the whole process, its start included, and the anonymous bytes that the conversion added."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxtml", "convert", str(source), str(destination), "--to", to]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        stop = threading.Event()
        held: list[int] = []

        def watch() -> None:
            working = destination.with_name(f".{destination.name}.converting")  # modules are loaded when it is there
            while not stop.wait(0.01):
                with contextlib.suppress(OSError):  # it has ended
                    if held or working.exists():
                        held.append(anonymous(child.pid))

        thread = threading.Thread(target=watch)
        thread.start()
        _, said = child.communicate()
        seconds = time.perf_counter() - began
        stop.set()
        thread.join()
    if child.returncode:
        raise SystemExit(f"the conversion ended with {child.returncode}: {said}")
    return seconds, max(held) - held[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = checkpoint(folder / "hf", args.gigabytes)
        rows: list[dict[str, float]] = []
        for _ in range(args.pairs):
            forgotten(folder / "hf")
            began = time.perf_counter()
            shutil.copytree(folder / "hf", folder / "copy", copy_function=_cp)
            row = {"cp_s": time.perf_counter() - began}
            subprocess.run(["sync"], check=True)
            row["synced_s"] = time.perf_counter() - began
            forgotten(folder / "hf")
            row["orbax_s"], row["orbax_bytes"] = converted(folder / "hf", folder / "ours", "orbax")
            forgotten(folder / "ours")
            row["hf_s"], row["hf_bytes"] = converted(folder / "ours", folder / "back", "hf")
            same = all(
                (folder / "back" / file.name).read_bytes() == file.read_bytes()
                for file in (folder / "hf").glob("*.safetensors")
            )
            if not same:
                raise SystemExit("there and back the files differ")
            for made in ("copy", "ours", "back"):
                shutil.rmtree(folder / made)
            rows.append(row)
            console.print(_told(row))
    middle = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    print(json.dumps({"bytes": size, **middle}) if args.json else f"{size / 1e9:.2f} GB, medians: {_told(middle)}")


def _told(row: dict[str, float]) -> str:
    def of(to: str) -> str:
        seconds, held = row[f"{to}_s"], row[f"{to}_bytes"] / 1e9
        ratios = f"{seconds / row['synced_s']:.2f} x, {seconds / row['cp_s']:.2f} x cp alone"
        return f"{seconds:.2f} s ({ratios}), +{held:.2f} GB"

    return f"cp {row['cp_s']:.2f} s, with sync {row['synced_s']:.2f} s; to ours {of('orbax')}; back {of('hf')}"


def _cp(source: str, destination: str) -> None:
    subprocess.run(["cp", source, destination], check=True)


if __name__ == "__main__":
    main()
