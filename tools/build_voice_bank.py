#!/usr/bin/env python3
"""Builds a speech bank that gives the vocoder more material: the model's own voice, saying sentences with many words.

The model's replies in the short-answer task (docs/evaluation.md) use few of the sound sequences of English. The
sentences of this tool are put together from lists of words chosen for their sounds; they mean nothing. 120 sentences
are about five minutes of speech and take four CPU-minutes. A build that was killed goes on when the same command runs
again.

To train on this bank and the bank of the short-answer task together, call
`jaxtml.train.vocoder.training.train_vocoder` with both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from jaxtml.commands.arguments import count, run_tool, tool_parser
from jaxtml.data.bank import PlannedUtterance, build
from jaxtml.data.voices.registry import OWN_VOICE

ADJECTIVES = (
    "azure beige brisk calm cheap coy crisp deaf eager empty faint fierce fresh frozen gentle giant gruff heavy "
    "huge icy jolly keen lazy loud lucky mauve mild narrow noisy odd pale plain proud pure quaint quick rough "
    "royal rusty shy silent sleepy smooth solid square strange sturdy sweet thick thin tiny tough usual vague "
    "vivid warm weird young"
)
NOUNS = (
    "acorn airport apple author badge bath beach bird bridge brother bus cage chair cheese child church cloth "
    "coin cousin cow desk dog door dusk earth eagle engine eye farm fish flower frog garage garden ghost glove "
    "goose guitar hammer harbor horse house ice island jacket jaw judge juice key kite knife lamb lawyer leaf "
    "lion lunch machine measure mirror mouse mouth music neighbor oak ocean oven owl oyster paper pearl pigeon "
    "pillow plough puzzle queen rabbit river road roof rouge ship shoe shovel sky snow song spoon stairs stove "
    "sugar teacher thief thumb thunder tooth toy treasure tree uncle valley vase village vision voice wagon watch "
    "whale wheel wolf wood yacht yard zebra zoo"
)
VERBS = (
    "asks avoids beats bends blesses breathes brings catches changes chooses climbs covers crushes dodges draws "
    "drops edges enjoys fetches finds follows forgives gathers guards hatches heals hides hugs joins judges kicks "
    "launches leaves loathes loves mends moves needs offers owns paints pleases praises pulls pushes reaches rubs "
    "saves shakes shields shows sketches soothes spoils squeezes stirs teaches thanks throws touches urges views "
    "visits watches weaves"
)
PLACES = "above across after along around before behind below beside beyond near over past through under with"
SHARD = 60  # sentences; a killed build loses the unfinished shard of each worker
SHAPES = (
    "The {a} {n} {v} the {b} {m}.", "A {n} {v} the {m} {p} the {a} {o}.", "{Why} the {n} {v} the {m}, the {o} {w} it.",
    "Does the {a} {n} stay {p} the {m}?", "Yes, the {n} {v} the {m}!", "This {a}, {b} {n} {v} those {m} things.",
    "Oh, that {n}? It {v} the {a} {m} {p} my {o}.", "Please put the {n} {p} the {m}, then the {a} {o}.",
)  # fmt: skip


def make_sentences(number: int, seed: int) -> list[str]:
    """Returns `number` sentences, which depend on `number` and `seed` alone. Every word of a list is used before any
    word is used again."""
    rng = np.random.default_rng(seed)
    decks: dict[str, list[str]] = {}

    def draw(words: str) -> str:
        if not decks.get(words):
            decks[words] = list(rng.permutation(words.split()))
        return decks[words].pop()

    made = []
    for index in range(number):
        words = {
            "a": draw(ADJECTIVES), "b": draw(ADJECTIVES), "n": draw(NOUNS), "m": draw(NOUNS), "o": draw(NOUNS),
            "v": draw(VERBS), "w": draw(VERBS), "p": draw(PLACES), "Why": draw("When If While Because Though"),
        }  # fmt: skip
        made.append(SHAPES[index % len(SHAPES)].format(**words))
    return made


def build_bank(args: argparse.Namespace) -> None:
    rates = np.random.default_rng(1).uniform(0.9, 1.15, args.sentences)
    items = [
        PlannedUtterance("assistant", "train", OWN_VOICE, text, rate=round(float(rate), 3))
        for text, rate in zip(make_sentences(args.sentences, seed=0), rates, strict=True)
    ]
    shards = [tuple(items[first : first + SHARD]) for first in range(0, len(items), SHARD)]
    build(args.out, shards, args.workers)


if __name__ == "__main__":
    parser = tool_parser(__doc__, "tools/build_voice_bank.py --out data/voice --sentences 120")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the bank")
    parser.add_argument("--sentences", type=count, default=120, help="number of sentences (default: 120)")
    parser.add_argument("--workers", type=count, default=2, help="processes that synthesise (default: 2)")
    run_tool(parser, build_bank)
