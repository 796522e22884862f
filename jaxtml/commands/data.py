"""`jaxtml data`: builds training data, and writes examples of it for people to look at."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from jaxtml import config as configs
from jaxtml.commands.arguments import add_config, count
from jaxtml.errors import InputError

HELP = "build or inspect training data"
EXAMPLE = "data tiny --out data --show 5"

VOCABULARY = 640  # tokens of a new tokenizer, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the folder of the data: bank/, tokenizer.json, examples/, cache/"
    )
    parser.add_argument(
        "--show", type=count, default=0, metavar="K", help="write K examples, each as a WAV file and a picture"
    )
    parser.add_argument("--workers", type=count, default=2, help="how many processes synthesise speech (default: 2)")
    parser.add_argument(
        "--rows",
        type=count,
        metavar="N",
        help="also encode N training rows (one conversation each) and keep them in DIR/cache for `jaxtml train`",
    )
    parser.add_argument(
        "--no-build", action="store_true", help="synthesise nothing; use what is already in the speech bank"
    )


def run(args: argparse.Namespace) -> None:
    """Builds the tokenizer and the dataset if they are missing. Then encodes rows and writes examples, if asked to.

    Raises:
      InputError: the config cannot be used, the speech bank is missing, or the dataset has no conversations to show.
    """
    from jaxtml.data import cache, examples
    from jaxtml.data.dataset import ConversationDataset, build_dataset, open_dataset
    from jaxtml.data.tasks import scenarios
    from jaxtml.stream.text import TextCodec

    config = configs.load(args.config, args.set)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.exists():
        size = min(config.duplex.control_base, VOCABULARY)
        TextCodec.train(scenarios.corpus(), size).save(tokenizer)
    if not args.no_build:
        build_dataset(config, out, args.workers)
    if not args.show and not args.rows:
        return
    dataset = open_dataset(config, TextCodec.load(tokenizer), out)
    if not isinstance(dataset, ConversationDataset):
        raise InputError(f"dataset {config.data.dataset} has no conversations: leave out --show and --rows")
    if args.rows:
        cache.build(dataset, out / cache.CACHE_FOLDER, args.rows, args.workers)
    if args.show:
        talks = map(dataset.conversation, itertools.count())
        for text in examples.write_examples(talks, out / "examples", args.show):
            print(text)
