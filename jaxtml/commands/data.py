"""`jaxtml data`: builds training data, and writes examples of it for people to look at."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from jaxtml import config as configs
from jaxtml.commands.arguments import add_config, count, path_name, worker_count
from jaxtml.errors import InputError

HELP = "build or inspect training data"
EXAMPLE = "data tiny --out data --show 5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--out",
        type=path_name,
        required=True,
        metavar="DIR",
        help="the folder of the data: bank/, tokenizer.json, examples/, cache/",
    )
    parser.add_argument(
        "--show",
        type=count,
        default=0,
        metavar="K",
        help="write K examples, each as a WAV file and a picture (default: none)",
    )
    parser.add_argument(
        "--workers",
        type=worker_count(cores_each=1),
        default="auto",
        metavar="N",
        help="how many processes synthesise speech and encode rows (default: auto, one for each CPU core)",
    )
    parser.add_argument(
        "--rows",
        type=count,
        metavar="N",
        help="also encode N training rows (one conversation each) and keep them in DIR/cache for `jaxtml train` "
        "(default: none)",
    )
    parser.add_argument(
        "--no-build",
        action="store_true",
        help="synthesise nothing; use what is already in the speech bank, and say what is missing",
    )
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        type=path_name,
        metavar="FILE",
        help="the tokenizer of the data: a tokenizer.json, or the directory of a checkpoint or a release that has one "
        "(default: the one in DIR; a new DIR gets that of the shipped tiny)",
    )
    tokenizer.add_argument(
        "--new-tokenizer",
        action="store_true",
        help="train a new tokenizer on the texts of the task as they are now; a run on this data then cannot start "
        "from a checkpoint that was made with the former tokenizer, the shipped weights included",
    )


def run(args: argparse.Namespace) -> None:
    """Chooses the tokenizer, and builds what the dataset lacks. Then encodes rows and writes examples, if asked to.

    Raises:
      InputError: the config or the tokenizer cannot be used, the number of rows does not fit the cache, the speech bank
        is missing, or the dataset has no conversations to show.
    """
    from absl import logging

    from jaxtml.data import cache, examples
    from jaxtml.data.dataset import ConversationDataset, build_dataset, missing_data, open_dataset
    from jaxtml.data.tokenizer import choose_tokenizer

    config = configs.load(args.config, args.set)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    if args.rows:
        cache.check_count(out / cache.CACHE_FOLDER, args.rows)
    missing = missing_data(config, out) if args.no_build else None
    out.mkdir(parents=True, exist_ok=True)
    given = Path(args.tokenizer) if args.tokenizer else None
    codec = choose_tokenizer(config, out, given, args.new_tokenizer)
    if not args.no_build:
        build_dataset(config, out, args.workers)
    elif missing:
        logging.warning("%s. It is used as it is; without --no-build the command makes what is missing", missing)
    if not args.show and not args.rows:
        return
    dataset = open_dataset(config, codec, out)
    if not isinstance(dataset, ConversationDataset):
        raise InputError(f"dataset {config.data.dataset} has no conversations: leave out --show and --rows")
    if args.rows:
        cache.build(dataset, out / cache.CACHE_FOLDER, args.rows, args.workers)
    if args.show:
        talks = map(dataset.conversation, itertools.count())
        for text in examples.write_examples(talks, out / "examples", args.show):
            print(text)
