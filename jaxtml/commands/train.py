"""`jaxtml train`: trains or resumes a model, or the vocoder alone."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtml import config as configs
from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.commands.arguments import add_config, count, folder_name, path_name, worker_count
from jaxtml.errors import InputError

if TYPE_CHECKING:  # heavy to import
    from jaxtml.model.spec import Params

HELP = "train or resume a model, or the vocoder"
EXAMPLE = "train tiny --workdir run --data data"

VOCODER_STEPS, VOCODER_BASE = 5000, "tiny"
# Options of `jaxtml train` that have no meaning for the vocoder, by their names in the parsed arguments.
_NOT_FOR_VOCODER = ("vocoder", "change_run", "workers", "mesh", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "the name of a config in configs/, its path, or `vocoder`")
    parser.add_argument(
        "--workdir",
        type=folder_name,
        required=True,
        metavar="DIR",
        help="the folder of the run; a run that was interrupted is resumed",
    )
    parser.add_argument(
        "--data", type=path_name, metavar="DIR", help="the folder that `jaxtml data` wrote (default: WORKDIR/data)"
    )
    parser.add_argument(
        "--steps",
        type=count,
        help=f"how many steps to train (default: train.steps of the config; {VOCODER_STEPS} for the vocoder)",
    )
    parser.add_argument(
        "--vocoder",
        type=folder_name,
        metavar="DIR",
        help="the model gets the vocoder of this directory: a run of `jaxtml train vocoder`, or a checkpoint",
    )
    parser.add_argument(
        "--start-from",
        type=folder_name,
        metavar="DIR",
        help="a checkpoint whose parameters a new run starts with; for the vocoder, also a run of it",
    )
    parser.add_argument(
        "--change-run",
        action="store_true",
        help="resume with another learning rate, weight decay or weight of a loss than the run began with",
    )
    parser.add_argument(
        "--base",
        type=path_name,
        metavar="CONFIG",
        help=f"the config whose vocoder `jaxtml train vocoder` trains (default: {VOCODER_BASE})",
    )
    parser.add_argument(
        "--workers",
        type=worker_count(cores_each=2),
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
    """Trains until the last step. Raises `InputError` if an option, the data or a checkpoint cannot be used."""
    from jaxtml.parallel.processes import join_processes, process_rank

    if Path(args.workdir).exists() and not Path(args.workdir).is_dir():
        raise InputError(f"--workdir {args.workdir} is a file: name a folder")

    if args.config == "vocoder":
        _check_vocoder_options(args, process_rank() is not None)
        with _named_disk(args.workdir):
            _train_vocoder(args)
        return
    if args.base is not None:
        raise InputError(f"--base {args.base} is an option of `jaxtml train vocoder`: leave it out")
    config = configs.load(args.config, args.set + ([f"train.steps={args.steps}"] if args.steps else []))
    data = _data_folder(args, args.config)
    join_processes()
    with _named_disk(args.workdir):
        _train_model(args, config, data)


@contextmanager
def _named_disk(workdir: str) -> Iterator[None]:
    """Names `workdir` in the error of a full disk, if the error names no file: a flush does not know its file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            error.filename = workdir
        raise


def _train_model(args: argparse.Namespace, config: configs.Config, data: Path) -> None:
    import jax

    from jaxtml.parallel.mesh import MeshShape
    from jaxtml.train.loop import train

    train(
        config,
        Path(args.workdir),
        data,
        workers=args.workers or worker_count(cores_each=2)("auto"),
        vocoder=_read_vocoder(args, config) if args.vocoder else None,
        start_from=Path(args.start_from) if args.start_from else None,
        mesh=MeshShape(data=jax.device_count()) if args.mesh is None else MeshShape.parse(args.mesh),
        profile=args.profile,
        change_run=args.change_run,
    )


def _train_vocoder(args: argparse.Namespace) -> None:
    from jaxtml.train.vocoder.training import train_vocoder

    base = args.base or VOCODER_BASE
    config, data = configs.load(base, args.set), _data_folder(args, base)
    start_from = Path(args.start_from) if args.start_from else None
    train_vocoder(config, [data / "bank"], args.workdir, args.steps or VOCODER_STEPS, start_from=start_from)


def _read_vocoder(args: argparse.Namespace, config: configs.Config) -> Params:
    """Returns the vocoder of `--vocoder`. Raises `InputError` if its sizes are not those of `config`."""
    from jaxtml.train.storage import compare
    from jaxtml.train.vocoder.storage import load_vocoder

    found, vocoder = load_vocoder(args.vocoder)
    differences = compare(found.vocoder, config.vocoder, "vocoder")
    if differences:
        fields = ", ".join(
            f"{field} is {theirs} there and {ours} in {config.name}" for field, theirs, ours in differences
        )
        raise InputError(
            f"the vocoder in {args.vocoder} does not fit {config.name}: its sizes differ ({fields}); "
            f"train one with `jaxtml train vocoder --base {args.config}`"
        )
    return vocoder


def _data_folder(args: argparse.Namespace, config: str) -> Path:
    """Returns the folder of the data. Raises `InputError` if `jaxtml data` has not written it."""
    data = Path(args.data) if args.data else Path(args.workdir) / "data"
    if data.exists() and not data.is_dir():
        raise InputError(f"--data {data} is a file: name the folder that `jaxtml data` wrote")
    if not (data / TOKENIZER).is_file() and (args.config != "vocoder" or not (data / "bank").is_dir()):
        out = args.data or "data"
        then = "" if args.data else f", then give --data {out}"
        raise InputError(
            f"no training data in {data} (no tokenizer at {data / TOKENIZER}): "
            f"run `jaxtml data {config} --out {out}` first{then}"
        )
    return data


def _check_vocoder_options(args: argparse.Namespace, in_job: bool) -> None:
    """Raises `InputError` for options and jobs that `jaxtml train vocoder` cannot use."""
    given = [f"--{name.replace('_', '-')}" for name in _NOT_FOR_VOCODER if getattr(args, name)]
    if given:
        raise InputError(
            f"`jaxtml train vocoder` trains on one device in one process, and has no {', '.join(given)}: leave it out"
        )
    unread = [text for text in args.set if not text.startswith("vocoder.")]
    if unread:
        raise InputError(
            f"--set {unread[0]}: `jaxtml train vocoder` reads the fields vocoder.* of the config alone, and --steps: "
            "leave the others out"
        )
    if in_job:
        raise InputError("`jaxtml train vocoder` runs in one process: start it outside of the job of several processes")
