"""The dataset `conversations`: sessions that are mixed from an utterance bank and encoded as rows.

This dataset is the default of `data.dataset` in a config. `jaxtml.data.dataset` opens it for the trainer and for
`jaxtml data`. A row is a pure function of the bank, the config, the tokenizer and the row's index. The random generator
that mixes the session is seeded with (seed, index). In some rows, words of the transcript are replaced by wrong ones;
the generator for that is seeded with (seed, index, 1).
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from absl import logging

from jaxtml.config import Config
from jaxtml.data import bank, bank_plan
from jaxtml.data.bank import Bank
from jaxtml.data.rows import Row, max_own_speech, pad
from jaxtml.data.talks.mix import make_conversation
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.talks.weights import ScenarioWeights
from jaxtml.data.tasks.scenarios import VOCABULARY, assistant_texts, fingerprint
from jaxtml.errors import InputError
from jaxtml.stream.conversation import Conversation
from jaxtml.stream.encoding import encode
from jaxtml.stream.layout import EncodedConversation
from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import Term
from jaxtml.strict_json import dumps

BANK_FOLDER = "bank"
"""The utterance bank inside the folder that `jaxtml data` writes."""

_FORMAT = 5
"""Part of the digest. Raise it when changed code makes other rows from the same inputs. The texts of the task need no
such care: the digest has their fingerprint."""

_FIRST_TASK = "46d7f74014cfe6232d57901df0605d78358248ebb3ff9b2546c35c64f855d61d"
"""The fingerprint of the task's texts when the digest had no fingerprint yet. Digests of these texts stay as they were,
so that existing caches and runs can be used."""

_MISHEARD_SHARE = (0.1, 0.4)
"""In a row with wrong words, this share of the transcript's tokens is replaced. Each such row draws its share between
the two bounds.

The bounds are wide, because a model mishears many words early in training and fewer later."""


def build(config: Config, folder: Path, workers: int) -> None:
    """Synthesises the utterance bank of this dataset into `folder`, or speaks what an existing one lacks."""
    seed = config.data.seed
    bank.build(
        folder / BANK_FOLDER, bank_plan.full_plan(seed), workers, adapt=lambda spoken: bank_plan.full_plan(seed, spoken)
    )


def missing(config: Config, folder: Path) -> str | None:
    """Returns in words what `build` would speak; None if the bank in `folder` is complete.

    Raises:
      InputError: there is no bank.
    """
    path, plan = folder / BANK_FOLDER, bank_plan.full_plan(config.data.seed)
    if not path.is_dir():
        raise InputError(
            f"there is no speech bank {path} to use: leave out --no-build, and the command speaks all "
            f"{sum(map(len, plan))} utterances; or name the --out of an earlier `jaxtml data`"
        )
    lacking = bank.missing_utterances(path, plan, lambda spoken: bank_plan.full_plan(config.data.seed, spoken))
    if not lacking:
        return None
    first = f"{lacking[0].voice} saying {lacking[0].text!r}"
    return f"{path} lacks {len(lacking)} utterances of the plan, the first is {first}"


@dataclass(frozen=True)
class GeneratedConversations:
    """A dataset of mixed sessions (`jaxtml.data.dataset.ConversationDataset`).

    Worker processes receive a pickled copy, so that all of them read the same bank.

    Attributes:
      config: `config.data` holds the length of rows and the seed.
      codec: turns words into token ids.
      speakers: the voices of one split of a bank.
      weights: how often each scenario is drawn.
    """

    config: Config
    codec: TextCodec
    speakers: Speakers
    weights: ScenarioWeights = ScenarioWeights()

    @staticmethod
    def open(config: Config, codec: TextCodec, folder: Path, split: str = "train") -> GeneratedConversations:
        """Opens the bank inside `folder`. Logs a warning if the bank lacks replies of the task.

        Raises:
          InputError: `folder` has no readable bank, or the bank has no voices of this split.
        """
        speakers = Speakers.of(Bank.open(folder / BANK_FOLDER), split)
        lacking = [text for text in assistant_texts() if text not in speakers.replies]
        if lacking:
            logging.warning(
                "%s has no recording of %d replies, the first is %r: no session has them. `jaxtml data` without "
                "--no-build speaks them", folder / BANK_FOLDER, len(lacking), lacking[0],
            )  # fmt: skip
        return GeneratedConversations(config, codec, speakers)

    @property
    def digest(self) -> str:
        """The sha256 of everything that decides what row `i` is.

        `data.dataset` and `data.max_patches` are left out, and `data.longest_silence` where it is None. None of them
        changes a row of generated conversations, and existing caches have a digest without them.
        """
        data = dataclasses.asdict(self.config.data)
        del data["dataset"], data["max_patches"]
        if data["longest_silence"] is None:
            del data["longest_silence"]
        made_from = [
            _FORMAT,
            self.speakers.bank.digest,
            data,
            dataclasses.asdict(self.config.duplex),
            dataclasses.asdict(self.weights),
            [self.codec.encode(text) for text in sorted(self.speakers.replies)],
            hashlib.sha256(self.speakers.users.tobytes()).hexdigest(),
            *([] if fingerprint() == _FIRST_TASK else [fingerprint()]),
        ]
        return hashlib.sha256(dumps(made_from).encode()).hexdigest()

    def conversation(self, index: int) -> Conversation:
        """Returns the session that row `index` is made from."""
        data = self.config.data
        rng = np.random.default_rng((data.seed, index))
        return make_conversation(rng, self.speakers, self.weights, data.turns)

    def encoded(self, index: int) -> EncodedConversation:
        """Returns the session of row `index`, encoded and cut at `config.data.tokens` positions."""
        data = self.config.data
        encoded = encode(
            self.conversation(index),
            self.codec,
            self.config.duplex,
            heard_delay_ms=data.heard_delay_ms,
            lead_ms=data.text_lead_ms,
            max_tokens=data.tokens,
            max_speech=max_own_speech(data.tokens),
            longest_silence=data.longest_silence,
        )
        rng = np.random.default_rng((data.seed, index, 1))
        if rng.random() >= data.misheard:
            return encoded
        return with_misheard_words(rng, encoded, self.config, self._vocabulary)

    def row(self, index: int) -> Row:
        """Returns the arrays of row `index` (see `jaxtml.data.rows.row_shapes`)."""
        return pad(self.encoded(index), self.config, self.max_patches)

    @property
    def max_patches(self) -> int:
        """Patches of a row: none, as nobody shows a picture in a generated conversation."""
        return 0

    @cached_property
    def _vocabulary(self) -> np.ndarray:
        """`[n]` the tokens of every word of the short-answer task."""
        return np.array([token for word in VOCABULARY for token in self.codec.encode(word)])


def with_misheard_words(
    rng: np.random.Generator, encoded: EncodedConversation, config: Config, other_tokens: np.ndarray
) -> EncodedConversation:
    """Returns the conversation with some tokens of its transcript replaced by random ones of `other_tokens`.

    Only the input tokens change. The targets stay the words that the user said, so that the model has to find the next
    word in the sound. A model that has only read flawless transcripts trusts its own transcript too much (exposure
    bias). The assistant's text answers what the user really said, not the wrong words of the transcript. So its loss
    terms are switched off in such a row.
    """
    heard = 1 + np.flatnonzero((encoded.term == Term.HEARD) & (encoded.target < config.duplex.control_base))
    heard = heard[heard < len(encoded.ids)]
    wrong = heard[rng.random(len(heard)) < rng.uniform(*_MISHEARD_SHARE)]
    if not len(wrong):
        return encoded
    ids = encoded.ids.copy()
    ids[wrong] = rng.choice(other_tokens, len(wrong))
    return replace(encoded, ids=ids, term=np.where(encoded.term == Term.TEXT, Term.NONE, encoded.term))
