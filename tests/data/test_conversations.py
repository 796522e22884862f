"""A row of a generated conversation decodes to that conversation. The config says how many rows have misheard words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tones import ToneBank

from jaxtml import config as configs
from jaxtml.data.conversations import GeneratedConversations
from jaxtml.data.talks.speakers import Speakers
from jaxtml.data.tasks import scenarios
from jaxtml.stream.decoding import decode
from jaxtml.stream.encoding import encode
from jaxtml.stream.text import TextCodec
from jaxtml.stream.tokens import Term


@pytest.fixture(scope="module")
def dataset() -> GeneratedConversations:
    config = configs.load("tiny", ["data.turns=50", "data.tokens=384"])
    return GeneratedConversations(config, TextCodec.train(scenarios.corpus(500), 512), Speakers.of(ToneBank.made()))


def test_a_row_reads_back_as_its_conversation(dataset):
    talk = next(talk for talk in map(dataset.conversation, range(20)) if len(talk.speech) > 1)
    duplex = dataset.config.duplex
    decoded = decode(encode(talk, dataset.codec, duplex), dataset.codec, duplex)
    heard = " ".join(word.text for word in decoded.heard)
    assert " ".join(word.text for word in talk.user_words).startswith(heard)
    assert [speech.start_micro_turn for speech in decoded.speech] == [speech.start_micro_turn for speech in talk.speech]


def test_another_seed_gives_other_rows(dataset):
    other = dataclasses.replace(dataset, config=configs.override(dataset.config, "data.seed=2"))
    assert any(not np.array_equal(other.row(0)[name], array) for name, array in dataset.row(0).items())


def test_a_misheard_row_differs_in_its_transcript_only_and_has_no_loss_on_the_assistants_text(dataset):
    base = dataset.config.duplex.control_base
    never, always = (
        dataclasses.replace(dataset, config=configs.override(dataset.config, f"data.misheard={share}"))
        for share in (0.0, 1.0)
    )
    changed = heard = 0
    for index in range(12):
        true, wrong = never.encoded(index), always.encoded(index)
        for name in ("kind", "bins", "micro_turn", "target", "speech_at", "speech"):
            np.testing.assert_array_equal(getattr(true, name), getattr(wrong, name))
        differs = np.flatnonzero(true.ids != wrong.ids)
        assert (true.term[differs - 1] == Term.HEARD).all() and (true.ids[differs] < base).all()
        changed += len(differs)
        heard += ((true.term == Term.HEARD) & (true.target < base)).sum()
        if len(differs):
            assert not (wrong.term == Term.TEXT).any()
            kept = true.term != Term.TEXT
            np.testing.assert_array_equal(true.term[kept], wrong.term[kept])
    assert 0.1 < changed / heard < 0.4
