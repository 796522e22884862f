#!/usr/bin/env python3
"""Says how long a talk a session remembers, and in how many bytes.

The tool measures the token rates of generated conversations: all tokens, and those that global layers retain beyond
their window (`jaxtml.model.attention.retention`). It then says how many seconds of sound and how many minutes of talk
fit into the memory of a session: as the config is, and with other windows (`--window`) at the same bytes. The room
that a smaller window leaves is for retained tokens.

The rates depend on how densely people talk, and on the tokenizer. The generated conversations are dense: hardly any
second passes in silence. The result has the words per minute of both sides, for a comparison with other talks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtml import config as configs
from jaxtml.checkpoint.files import TOKENIZER
from jaxtml.commands.arguments import add_config, count, run_tool, tool_parser
from jaxtml.config import Config
from jaxtml.data.dataset import ConversationDataset, open_dataset
from jaxtml.errors import InputError
from jaxtml.model.attention.retention import is_retained, number_micro_turns
from jaxtml.model.duplex.state import session_bytes
from jaxtml.model.interaction import InteractionModel
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import PositionKind
from jaxtml.strict_json import dumps


class Rates(NamedTuple):
    """What a second of conversation brings, on average.

    Attributes:
      tokens: all tokens.
      retained: tokens that are retained.
      retained_words: those of them that are words or parts of words; the others are control tokens.
      words: words that both sides say.
      with_text: the share of micro-turns that have text.
    """

    tokens: float
    retained: float
    retained_words: float
    words: float
    with_text: float


class Memory(NamedTuple):
    """What a session remembers, and in how many bytes.

    Attributes:
      window: tokens of the window of global layers.
      retained: tokens that they retain beyond it.
      state_bytes: bytes of the whole state of a session.
      window_s: seconds of conversation in the window.
      talk_min: minutes of conversation whose text is visible, in the window or retained.
    """

    window: int
    retained: int
    state_bytes: int
    window_s: float
    talk_min: float


def measure_rates(dataset: ConversationDataset, control_base: int, conversations: int) -> Rates:
    """Measures the rates of the first conversations of a dataset. Ids from `control_base` on are control tokens.

    Raises:
      InputError: the conversations have no text, so that nothing is retained.
    """
    tokens = retained = retained_words = words = micro_turns = with_text = 0
    for index in range(conversations):
        encoded = dataset.encoded(index)
        kind = jnp.asarray(encoded.kind[None])
        number = number_micro_turns(kind)
        mask = np.asarray(is_retained(kind, number))
        tokens += mask.size
        retained += int(mask.sum())
        retained_words += int((mask[0] & (encoded.kind == PositionKind.TEXT) & (encoded.ids < control_base)).sum())
        turns = len(encoded.clock)
        micro_turns += turns
        with_text += int((mask & (kind == PositionKind.TURN)).sum())
        conversation, stop_s = dataset.conversation(index), turns * MICRO_TURN_MS / 1000
        said = [word for speech in conversation.speech for word in speech.words]
        words += sum(word.end_s <= stop_s for word in (*conversation.user_words, *said))
    if not retained:
        raise InputError(f"{conversations} conversations have no text: measure more, or longer rows (data.tokens)")
    seconds = micro_turns * MICRO_TURN_MS / 1000
    return Rates(
        tokens / seconds, retained / seconds, retained_words / seconds, words / seconds, with_text / micro_turns
    )


def describe_memory(config: Config, rates: Rates) -> Memory:
    """Returns what a session of `config` remembers at these rates."""
    kind = config.backbone.global_
    size = session_bytes(InteractionModel(config))
    window_s = kind.window / rates.tokens
    return Memory(kind.window, kind.retained, size, window_s, (window_s + kind.retained / rates.retained) / 60)


def with_window(config: Config, window: int) -> Config:
    """Returns `config` with another window, and as many more retained tokens as the window has fewer."""
    kind = config.backbone.global_
    if window > kind.window + kind.retained:
        raise InputError(
            f"--window {window}: the memory has {kind.window + kind.retained} tokens, give at most as many"
        )
    kind = replace(
        kind,
        window=window,
        retained=kind.window + kind.retained - window,
        rel_extent=min(kind.rel_extent, window),
    )
    config = replace(config, backbone=replace(config.backbone, global_=kind))
    configs.validate(config)
    return config


def report(args: argparse.Namespace) -> None:
    config = configs.load(args.config, args.set)
    config = replace(config, data=replace(config.data, longest_silence=None))  # a session runs all of a silence
    codec = TextCodec.load(args.data / TOKENIZER)
    dataset = open_dataset(config, codec, args.data)
    if not isinstance(dataset, ConversationDataset):
        raise InputError(f"data.dataset {config.data.dataset!r}: its rows are no conversations, name another dataset")
    others = [with_window(config, window) for window in args.window]
    rates = measure_rates(dataset, config.duplex.control_base, args.conversations)
    memories = [describe_memory(one, rates) for one in (config, *others)]
    if args.json:
        print(dumps({"rates": rates._asdict(), "memories": [memory._asdict() for memory in memories]}))
        return
    console = Console()
    console.print(
        f"per second: {rates.tokens:.1f} tokens; {rates.retained:.2f} are retained, {rates.retained_words:.2f} of them "
        f"for {rates.words:.2f} words ({60 * rates.words:.0f} a minute); {rates.with_text:.0%} of the micro-turns have "
        "text"
    )
    table = Table("window", "retained", "bytes of a session", "everything of the last", "text of the last")
    for memory in memories:
        table.add_row(
            f"{memory.window:,}",
            f"{memory.retained:,}",
            f"{memory.state_bytes:,}",
            f"{memory.window_s:.1f} s",
            f"{memory.talk_min:.1f} min",
        )
    console.print(table)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/benchmarks/talk_memory.py tiny --data data --window 256")
    add_config(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `jaxtml data` wrote: a speech bank and a tokenizer",
    )
    parser.add_argument("--conversations", type=count, default=200, help="conversations to measure (default: 200)")
    parser.add_argument(
        "--window",
        type=count,
        action="append",
        default=[],
        help="also describe a window of this many tokens, in the same bytes (default: the config's window alone)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    run_tool(parser, report)
