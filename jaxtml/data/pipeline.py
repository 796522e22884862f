"""Training batches as a pure function of (seed, step): sessions mixed, encoded and padded, in worker processes.

Row `r` of step `s` is made from a generator seeded with (seed, s * batch + r) and from nothing else, so a run resumes
from one integer, with any number of workers and of hosts. Called by `jaxtml.train`, `jaxtml.data.cache` and
`jaxtml data`.

Axes: B batch, T positions, C clock features, P patches, S own-speech positions (padded; one position in three).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxtml.config import Config
from jaxtml.data.bank import Bank
from jaxtml.data.talks.mix import Speakers, Weights, make_conversation
from jaxtml.data.tasks.scenarios import VOCABULARY
from jaxtml.stream.clock import CLOCK_FEATURES
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.images import PATCH
from jaxtml.stream.layout import SPEECH_DIM, Sequence, encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import FRAMES_PER_MICRO_TURN, N_MELS
from jaxtml.stream.tokens import Term

Batch = dict[str, np.ndarray]

_SPEECH_SHARE = 3  # one position in three, at most, is own speech: more than sessions have, the typed ones too
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Rows:
    """Makes row after row; travels to the worker processes whole, so that all see the same bank.

    Attributes:
      config: `config.data` says how long rows are and from which seed they come.
      codec: words to token ids.
      speakers: whose voices.
      weights: how often each scenario.
    """

    config: Config
    codec: TextCodec
    speakers: Speakers
    weights: Weights = Weights()

    @staticmethod
    def open(config: Config, codec: TextCodec, bank: str | Path, split: str = "train") -> Rows:
        """Raises `InputError` where there is no readable bank with voices of that split."""
        return Rows(config, codec, Speakers.of(Bank.open(bank), split))

    def conversation(self, index: int) -> Conversation:
        """The session that row `index` is made from."""
        data = self.config.data
        rng = np.random.default_rng((data.seed, index))
        return make_conversation(rng, self.speakers, self.weights, data.turns)

    def sequence(self, index: int) -> Sequence:
        """The session of row `index`, encoded and cut at `config.data.tokens` positions."""
        data = self.config.data
        sequence = encode(
            self.conversation(index),
            self.codec,
            self.config.duplex,
            heard_delay_ms=data.heard_delay_ms,
            lead_ms=data.text_lead_ms,
            max_tokens=data.tokens,
            max_speech=speech_slots(data.tokens),
        )
        rng = np.random.default_rng((data.seed, index, 1))
        if rng.random() >= data.misheard:
            return sequence
        return misheard(rng, sequence, self.config, self._vocabulary)

    @cached_property
    def _vocabulary(self) -> np.ndarray:
        return np.array([token for word in VOCABULARY for token in self.codec.encode(word)])

    def __call__(self, index: int) -> Batch:
        """Row `index`, without the batch axis; see `pad`."""
        return pad(self.sequence(index), self.config)


_MISHEARD = (0.1, 0.4)  # of the words of such a row; an untrained listener gets more wrong, a good one fewer


def misheard(rng: np.random.Generator, sequence: Sequence, config: Config, others: np.ndarray) -> Sequence:
    """The sequence with some of its heard tokens, as they stand in its past, replaced by some of the tokens `others`.

    Targets keep what was said, so that the next word has to be found in the sound: left alone, a model that has only
    seen flawless transcripts believes its own (exposure bias). The text of the replies, which answers what was said, is
    not trained on here.
    """
    heard = 1 + np.flatnonzero((sequence.term == Term.HEARD) & (sequence.target < config.duplex.control_base))
    heard = heard[heard < len(sequence.ids)]
    wrong = heard[rng.random(len(heard)) < rng.uniform(*_MISHEARD)]
    if not len(wrong):
        return sequence
    ids = sequence.ids.copy()
    ids[wrong] = rng.choice(others, len(wrong))
    return replace(sequence, ids=ids, term=np.where(sequence.term == Term.TEXT, Term.NONE, sequence.term))


def row_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each array of a row.

    `kind` `[T]` uint8, `ids` `[T]` int32, `bins` `[T, 80]` uint8, `clock` `[T, C]` float32, `patches`
    `[P, 2, 40, 40, 3]` float32, `target` `[T]` int32, `term` `[T]` uint8, `speech_at` `[S]` int32 (0 where absent),
    `speech` `[S, 400]` float16 (log-mels in [-7, 2], exact to 0.002), `speech_valid` `[S]` bool.
    """
    tokens = config.data.tokens
    slots = speech_slots(tokens)
    patches = min(config.duplex.max_patches * config.data.turns, tokens)
    return {
        "kind": ((tokens,), np.uint8),
        "ids": ((tokens,), np.int32),
        "bins": ((tokens, N_MELS), np.uint8),
        "clock": ((tokens, CLOCK_FEATURES), np.float32),
        "patches": ((patches, 2, PATCH, PATCH, 3), np.float32),
        "target": ((tokens,), np.int32),
        "term": ((tokens,), np.uint8),
        "speech_at": ((slots,), np.int32),
        "speech": ((slots, SPEECH_DIM), np.float16),
        "speech_valid": ((slots,), np.bool_),
    }


def pad(sequence: Sequence, config: Config) -> Batch:
    """A sequence in the fixed shapes of its config (`row_shapes`); PAD positions at the end."""
    shapes = row_shapes(config)
    length, spoken = len(sequence.kind), len(sequence.speech_at)
    (tokens,), (slots,) = shapes["kind"][0], shapes["speech_at"][0]
    if length > tokens or spoken > slots:
        raise ValueError(f"{length} positions with {spoken} of own speech do not fit {tokens} and {slots}")

    def filled(name: str) -> np.ndarray:
        out = np.zeros(*shapes[name])
        if name == "clock":
            out[:length] = sequence.clock[sequence.turn]
        elif name == "speech_valid":
            out[:spoken] = True
        else:
            values = getattr(sequence, name)
            out[: len(values)] = values
        return out

    return {name: filled(name) for name in shapes}


def speech_slots(tokens: int) -> int:
    """Own-speech positions that a row of `tokens` has room for."""
    return FRAMES_PER_MICRO_TURN * (tokens // (FRAMES_PER_MICRO_TURN * _SPEECH_SHARE))


@dataclass(frozen=True)
class Share:
    """Which rows of the global batch this host makes: those of its devices, in order (None: all). On a torus they need
    not lie together."""

    rows: tuple[int, ...] | None = None

    def count(self, batch: int) -> int:
        return batch if self.rows is None else len(self.rows)

    def row(self, local: int, batch: int) -> int:
        """The global row of this host's `local`-th row, counted over all steps."""
        step, within = divmod(local, self.count(batch))
        return step * batch + (within if self.rows is None else self.rows[within])


def batches(
    rows: Callable[[int], Batch], batch: int, *, start: int = 0, workers: int = 0, share: Share = Share()
) -> grain.DatasetIterator[Batch]:
    """Batches from step `start` on, without end: `[B, ...]` of what `pad` returns, always the same for a step; B are
    the rows of this host's share.

    Args:
      rows: makes a row from its number: `Rows`, or `jaxtml.data.cache.CachedRows`.
      batch: rows of the global batch.
      start: the step to begin with: the one integer that a resumed run needs.
      workers: processes that make batches in advance; 0 makes them here. `close()` the iterator to end them.
      share: the part of a host.
    """
    part = share.count(batch)
    # Rows are batched before they are dealt to workers: whole steps go round, so their order is that of one process.
    steps = (
        grain.MapDataset.range(start * part, _ENDLESS)
        .map(lambda local: rows(share.row(int(local), batch)))
        .batch(part)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags; a program without flags gets their defaults
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        steps = steps.mp_prefetch(options)
    return iter(steps)
