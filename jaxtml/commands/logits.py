"""`jaxtml logits`: writes the text logits of a checkpoint for given tokens, so that anyone can check the model."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtml.commands.arguments import add_checkpoint, add_mesh, check_outputs, path_name
from jaxtml.errors import InputError

HELP = "write the text logits of a checkpoint for given tokens (teacher forcing)"
EXAMPLE = "logits --checkpoint DIR --tokens ids.npy --out logits.npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--tokens",
        type=path_name,
        required=True,
        metavar="NPY",
        help="a .npy file of token ids: an integer array [B, T] or [T]",
    )
    parser.add_argument(
        "--out",
        type=path_name,
        required=True,
        metavar="NPY",
        help="the .npy file to write: float32 logits [B, T, V]",
    )
    add_mesh(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the logits. Raises `InputError` if the checkpoint or the tokens cannot be used."""
    if Path(args.out).suffix.lower() not in ("", ".npy"):
        raise InputError(f"{args.out}: logits are written as NumPy's .npy; let the name end in .npy")
    check_outputs(args.out, sources=[args.tokens])
    from jaxtml.convert.logits import token_logits

    token_logits(args.checkpoint, args.tokens, args.out, args.mesh)
