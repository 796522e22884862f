"""`jaxtml plan`: compiles a program for hardware that this machine lacks.

The report has the program's memory, its FLOPs and a lower bound on its time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtml import config as configs
from jaxtml.commands.arguments import add_config
from jaxtml.parallel.chips import CHIPS
from jaxtml.strict_json import dumps

HELP = "compile a training step, or a server's step of 200 ms, for hardware that this machine lacks"
EXAMPLE = "plan tml_interaction_small --topology v5p:4x4x8 --mesh data=16,expert=8 --set train.batch=128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help=f"the chips ({', '.join(chip.name for chip in CHIPS)}) and how they are connected: v5p:4x4x8 or v5p-256 "
        "(TensorCores, two for each chip), v6e:4x4 or v6e-16 (chips), 2xv5p:4x4x8 (two slices), h100:2x8 (two hosts "
        "with eight GPUs each), 8xh200 (eight GPUs)",
    )
    parser.add_argument(
        "--program",
        choices=("train", "serve"),
        default="train",
        help="the program to compile: a training step, or a server's step of 200 ms (default: train)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="how chips share the work, for example data=16,expert=8 "
        "(default: the axis data for training, the axes expert and tensor for serving)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="find the largest batch that fits into memory, and for training the remat setting that it needs",
    )
    parser.add_argument(
        "--mix",
        metavar="FILE",
        type=Path,
        help="what the sessions of a server do, as tools/benchmarks/session_mix.py measures it "
        "(default: measured on generated conversations)",
    )
    parser.add_argument(
        "--slow-too",
        action="store_true",
        help="report a server although its longest micro-turn takes more than 200 ms, instead of refusing it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Prints the report.

    Raises:
      InputError: the topology or the mesh does not fit, memory is too small, or a server is too slow for real time.
    """
    from jaxtml.plan import planning
    from jaxtml.plan.mix import DEFAULT, Mix
    from jaxtml.plan.report_text import format_report

    mix = Mix.read(args.mix or DEFAULT)
    plan = planning.Plan(configs.load(args.config, args.set), args.program, mix, args.slow_too)
    make = planning.search_largest_plan if args.search else planning.make_plan
    report = make(plan, args.topology, args.mesh)
    print(dumps(report) if args.json else format_report(report))
