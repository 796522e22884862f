#!/usr/bin/env python3
"""Measures what sessions do in their micro-turns, on generated conversations; prints a mix for `jaxtml plan --mix`.

For each micro-turn of the split "test" it counts whether typed text or pictures come in, how many text tokens the
session writes before the gate, and whether it speaks. The data comes from `jaxtml data`.

Conversations do not tell how many guessed tokens a model confirms in a round of its loop (`jaxtml.plan.micro_turn`).
The mix has the number that `--confirmed` gives.

    tools/benchmarks/session_mix.py --data DATA > mix.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxtml import config as configs
from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.commands.arguments import add_config, count, number, run_tool, tool_parser
from jaxtml.data.dataset import ConversationDataset, open_dataset
from jaxtml.errors import InputError
from jaxtml.stream.layout import EncodedConversation
from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import PositionKind
from jaxtml.strict_json import dumps


def count_turns(encoded: EncodedConversation) -> Counter[tuple[bool, int, bool]]:
    """Counts (text or pictures come in, text tokens written, speaks) of each micro-turn."""
    kinds = encoded.kind
    turns: Counter[tuple[bool, int, bool]] = Counter()
    for micro_turn in range(len(encoded.clock)):
        here = encoded.micro_turn == micro_turn
        user = np.flatnonzero(here & (kinds == PositionKind.USER))
        patches = (kinds[here] == PositionKind.PATCH).any()
        text = np.flatnonzero(here & (kinds == PositionKind.TEXT))
        written = (text > user[-1]).sum()
        speaks = (kinds[here] == PositionKind.OWN).any()
        turns[bool(patches or (text < user[0]).any()), int(written), bool(speaks)] += 1
    return turns


def measure(args: argparse.Namespace) -> None:
    config = configs.load(args.config, args.set)
    config = replace(config, data=replace(config.data, longest_silence=None))  # a session runs all of a silence
    codec = TextCodec.load(args.data / TOKENIZER)
    dataset = open_dataset(config, codec, args.data, "test")
    if not isinstance(dataset, ConversationDataset):
        raise InputError(f"the dataset {config.data.dataset} has no conversations: name one that has")
    turns: Counter[tuple[bool, int, bool]] = Counter()
    for index in range(args.rows):
        turns += count_turns(dataset.encoded(index))
    entries = [
        {"given": given, "written": written, "speaks": speaks, "count": count}
        for (given, written, speaks), count in turns.most_common()
    ]
    measured = f"{args.rows} conversations of {config.name}"
    print(dumps({"measured": measured, "confirmed": args.confirmed, "turns": entries}, indent=1))


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/session_mix.py tiny --data DATA --rows 500")
    add_config(parser)
    parser.add_argument("--data", type=Path, required=True, help="what `jaxtml data` wrote")
    parser.add_argument("--rows", type=count, default=500, help="conversations to count (default: 500)")
    parser.add_argument(
        "--confirmed",
        type=number(0, 100),
        default=0.0,
        help="guessed tokens that each round of the loop confirms (default: 0)",
    )
    run_tool(parser, measure)
