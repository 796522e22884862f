#!/usr/bin/env python3
"""Puts a trained model and a trained vocoder together into a checkpoint to ship: bfloat16, with tokenizer and logs.

Exit status 1: the checkpoint is written, but larger than a package should carry (25 MB).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.commands.arguments import run_tool, tool_parser
from jaxtml.config import Config
from jaxtml.errors import InputError
from jaxtml.model.spec import Params, flatten
from jaxtml.train.vocoder.storage import load_vocoder

LIMIT_BYTES = 25_000_000
TRAINING_LOG, VOCODER_LOG = "training.jsonl", "vocoder_training.jsonl"


def with_vocoder_of(source: Path, config: Config, params: Params) -> tuple[Params, str | None]:
    """Returns the parameters with the vocoder of `source`, and the log of its training if there is one."""
    other, vocoder = load_vocoder(source)
    if other.vocoder != config.vocoder:
        raise InputError(f"the vocoder of {source} has other sizes than the model's config says")
    logs = [path for name in ("log.jsonl", VOCODER_LOG) if (path := source / name).is_file()]
    return {**params, "vocoder": vocoder}, logs[0].read_text() if logs else None


def make(args: argparse.Namespace) -> int:
    config, params = read_checkpoint(args.workdir)
    logs = {TRAINING_LOG: (args.workdir / "log.jsonl").read_text()}
    if args.vocoder is not None:
        params, log = with_vocoder_of(args.vocoder, config, params)
        if log is not None:
            logs[VOCODER_LOG] = log
    else:
        before = {path.name: path.read_text() for path in args.started_from.glob("*training.jsonl")}
        logs = {**before, TRAINING_LOG: before.get(TRAINING_LOG, "") + logs[TRAINING_LOG]}
    save_checkpoint(args.out, config, params, "bfloat16", args.workdir / "tokenizer.json")
    for name, text in logs.items():
        (args.out / name).write_text(text)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    total = sum(int(np.prod(array.shape)) for _, array in flatten(params))
    print(f"{args.out}: {total:,} parameters, {size / 1e6:.1f} MB")
    return 0 if size <= LIMIT_BYTES else 1


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/make_checkpoint.py --workdir run --vocoder vocoder --out jaxtml/assets/tiny")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="a run of `jaxtml train`")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--vocoder", type=Path, metavar="DIR", help="a run of `jaxtml train vocoder`, or a checkpoint with a vocoder"
    )
    source.add_argument(
        "--started-from",
        type=Path,
        metavar="DIR",
        help="the checkpoint that the run began with; its vocoder is kept, and its logs come before the run's",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new checkpoint")
    run_tool(parser, make)
