#!/usr/bin/env python3
"""Puts a trained model and a trained vocoder together as a checkpoint to ship: bfloat16, with tokenizer and logs.

python tools/make_checkpoint.py --workdir run --vocoder vocoder --out jaxtml/assets/tiny
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.errors import InputError
from jaxtml.model.spec import flatten
from jaxtml.train.vocoder.storage import load_vocoder

LIMIT_BYTES = 25_000_000
VOCODER_LOG = "vocoder_training.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path, help="of `jaxtml train`")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vocoder", type=Path, help="run of `jaxtml train vocoder`, or a checkpoint with one")
    source.add_argument(
        "--started-from", type=Path, help="the checkpoint that the run began with: its vocoder and logs"
    )
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    try:
        config, params = read_checkpoint(args.workdir)
        logs = {"training.jsonl": (args.workdir / "log.jsonl").read_text()}
        if args.vocoder is not None:
            other, vocoder = load_vocoder(args.vocoder)
            if other.vocoder != config.vocoder:
                raise InputError(f"{args.vocoder} trained another vocoder than {args.workdir} has")
            params = {**params, "vocoder": vocoder}
            told = [path for name in ("log.jsonl", VOCODER_LOG) if (path := args.vocoder / name).is_file()]
            logs |= {VOCODER_LOG: told[0].read_text()} if told else {}
        else:
            before = {path.name: path.read_text() for path in args.started_from.glob("*training.jsonl")}
            logs = {**before, "training.jsonl": before.get("training.jsonl", "") + logs["training.jsonl"]}
        save_checkpoint(args.out, config, params, "bfloat16", args.workdir / "tokenizer.json")
    except (InputError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    for name, text in logs.items():
        (args.out / name).write_text(text)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    total = sum(int(np.prod(array.shape)) for _, array in flatten(params))
    print(f"{args.out}: {total:,} parameters, {size / 1e6:.1f} MB")
    return 0 if size <= LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
