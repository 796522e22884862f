"""`jaxtml train`: trains or resumes a model, or the vocoder alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtml import config as configs
from jaxtml.commands.arguments import add_config, count, worker_count
from jaxtml.errors import InputError

HELP = "train or resume a model, or the vocoder"
EXAMPLE = "train tiny --workdir run --data data"

VOCODER_STEPS = 5000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "the name of a config in configs/, its path, or `vocoder`")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the folder of the run; a run that was interrupted is resumed"
    )
    parser.add_argument("--data", metavar="DIR", help="the folder that `jaxtml data` wrote (default: WORKDIR/data)")
    parser.add_argument(
        "--steps",
        type=count,
        help=f"how many steps to train (default: train.steps of the config; {VOCODER_STEPS} for the vocoder)",
    )
    parser.add_argument(
        "--vocoder",
        metavar="DIR",
        help="the model gets the vocoder of this directory: a run of `jaxtml train vocoder`, or a checkpoint",
    )
    parser.add_argument("--start-from", metavar="DIR", help="a checkpoint whose parameters a new run starts with")
    parser.add_argument(
        "--base",
        default="tiny",
        metavar="CONFIG",
        help="the config whose vocoder `jaxtml train vocoder` trains (default: tiny)",
    )
    parser.add_argument(
        "--workers",
        type=worker_count(cores_each=2),
        default="auto",
        metavar="N",
        help="how many processes prepare batches in advance (default: auto, one for every two CPU cores)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="how devices share the work, for example data=16,expert=8 (default: the axis data, over all devices)",
    )
    parser.add_argument(
        "--profile",
        type=count,
        default=0,
        metavar="N",
        help="write a profile of N steps to WORKDIR/profile (default: none)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains until the last step. Raises `InputError` if the config, the data or a checkpoint cannot be used."""
    import jax

    from jaxtml.parallel.mesh import MeshShape
    from jaxtml.parallel.processes import join_processes
    from jaxtml.train.loop import train
    from jaxtml.train.vocoder.storage import load_vocoder
    from jaxtml.train.vocoder.training import train_vocoder

    join_processes()
    workdir = Path(args.workdir)
    data = Path(args.data) if args.data else workdir / "data"
    if args.config == "vocoder":
        train_vocoder(configs.load(args.base, args.set), [data / "bank"], workdir, args.steps or VOCODER_STEPS)
        return
    overrides = [*args.set, f"train.steps={args.steps}"] if args.steps else args.set
    config = configs.load(args.config, overrides)
    vocoder = None
    if args.vocoder:
        vocoder_config, vocoder = load_vocoder(args.vocoder)
        if vocoder_config.vocoder != config.vocoder:
            raise InputError(
                f"the vocoder in {args.vocoder} does not fit {config.name}: its sizes differ; "
                f"train one with `jaxtml train vocoder --base {args.config}`"
            )
    train(
        config,
        workdir,
        data,
        workers=args.workers,
        vocoder=vocoder,
        start_from=Path(args.start_from) if args.start_from else None,
        mesh=MeshShape.parse(args.mesh) if args.mesh else MeshShape(data=jax.device_count()),
        profile=args.profile,
    )
