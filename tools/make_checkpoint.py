#!/usr/bin/env python3
"""Puts a trained model and a trained vocoder together as a checkpoint to ship: bfloat16, with tokenizer and logs.

python tools/make_checkpoint.py --workdir run --vocoder vocoder --out jaxtml/assets/tiny
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from jaxtml.convert.checkpoint import save_checkpoint
from jaxtml.errors import InputError
from jaxtml.model.spec import flatten
from jaxtml.train.loop import latest
from jaxtml.train.vocoder import trained

LIMIT_BYTES = 25_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path, help="of `jaxtml train`")
    parser.add_argument("--vocoder", required=True, type=Path, help="workdir of `jaxtml train vocoder`")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    try:
        config, _, params = latest(args.workdir)
        other, vocoder = trained(args.vocoder)
        if other.vocoder != config.vocoder:
            raise InputError(f"{args.vocoder} trained another vocoder than {args.workdir} has")
        save_checkpoint(args.out, config, {**params, "vocoder": vocoder}, "bfloat16", args.workdir / "tokenizer.json")
    except InputError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    shutil.copyfile(args.workdir / "log.jsonl", args.out / "training.jsonl")
    shutil.copyfile(args.vocoder / "log.jsonl", args.out / "vocoder_training.jsonl")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    total = sum(int(np.prod(array.shape)) for _, array in flatten(params))
    print(f"{args.out}: {total:,} parameters, {size / 1e6:.1f} MB")
    return 0 if size <= LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
