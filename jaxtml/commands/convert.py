"""`jaxtml convert`: converts checkpoints of any size between our format and Inkling's."""

from __future__ import annotations

import argparse
import gc

from jaxtml.commands.arguments import folder_name

HELP = "convert a checkpoint between the jaxtml format and Inkling's"
EXAMPLE = "convert inkling_dir out --to orbax --verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "src",
        type=folder_name,
        metavar="SRC",
        help="the directory of a jaxtml checkpoint, an Inkling checkpoint or a training run",
    )
    parser.add_argument("dst", type=folder_name, metavar="DST", help="the directory to write; it must be new or empty")
    parser.add_argument(
        "--to",
        choices=("orbax", "hf"),
        default="orbax",
        help="the format to write: a jaxtml checkpoint, or Inkling's safetensors (default: orbax)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="the dtype to write (default: each parameter keeps its own); "
        "Inkling's gate biases and scales are always float32",
    )
    parser.add_argument(
        "--as",
        dest="begin_as",
        metavar="CONFIG",
        help="write a model of this config that has SRC's weights; a layer that SRC lacks adds nothing to the hidden "
        "state until it is trained",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare SRC with its manifest, if it has one; read the result back before it appears as DST, and compare "
        "every tensor with SRC; compare the logits too if there is enough memory. If the same conversion wrote DST "
        "earlier, verify DST again",
    )


def run(args: argparse.Namespace) -> None:
    """Converts and prints a summary. Raises `InputError` as `jaxtml.convert.conversion.convert` does."""
    # The garbage collector takes half a second while modules and Orbax load. A conversion makes no reference cycles.
    gc.disable()
    from jaxtml.convert.conversion import convert

    print(convert(args.src, args.dst, to=args.to, dtype=args.dtype, begin_as=args.begin_as, verify=args.verify))
