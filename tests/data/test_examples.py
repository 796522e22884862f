"""An example lets a person hear, see and read the same conversation."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from tones import ToneBank

from jaxtml.data import examples
from jaxtml.data.talks import channel, mix
from jaxtml.data.talks.speakers import Speakers
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE


@pytest.fixture(scope="module")
def talks() -> list[Conversation]:
    speakers = Speakers.of(ToneBank.made())
    return [
        mix.make_conversation(np.random.default_rng(i), speakers, micro_turns=50, channel=channel.CLEAN)
        for i in range(3)
    ]


def test_examples_are_a_stereo_wav_a_picture_and_a_text(talks, tmp_path):
    texts = list(examples.write_examples(iter(talks), tmp_path / "new", 2))
    assert len(texts) == 2
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"example_{n}.{kind}" for n in range(2) for kind in ("png", "txt", "wav")
    ]
    heard, rate = soundfile.read(tmp_path / "new" / "example_1.wav", dtype="float32")
    assert rate == SAMPLE_RATE
    np.testing.assert_allclose(heard[:, 0], talks[1].user, atol=1e-4)
    np.testing.assert_allclose(heard[:, 1], talks[1].assistant, atol=1e-4)
    assert (tmp_path / "new" / "example_1.png").stat().st_size > 20_000


def test_words_with_dollar_signs_are_no_formulas(talks):
    words = tuple(Word(text, i, i + 0.5) for i, text in enumerate(("$5 and ^ $", "$_")))
    figure = examples.draw(replace(talks[0], user_words=words), "title")
    figure.savefig(io.BytesIO(), dpi=20)


def test_the_text_lists_user_turns_pauses_and_answers_in_order():
    n = 20 * MICRO_TURN_SAMPLES
    user_words = (Word("say", 0.2, 0.5), Word("red", 1.3, 1.7))
    talk = Conversation(
        user=np.zeros(n, np.float32),
        assistant=np.zeros(n, np.float32),
        user_words=user_words,
        speech=(Speech(9, 11, (Word("red", 2.0, 2.3),)),),
        scenario="hesitation",
        expected="red",
        user_end_s=(1.7,),
    )
    assert examples.pauses(talk) == [(0.5, 1.3)]
    assert examples.takeovers(talk) == [(1.7, 2.0)]
    assert [line.split(maxsplit=1)[1] for line in examples.summary(talk).splitlines()[2:]] == [
        "user       say red",
        "(pauses for 0.80 s)",
        "(answered after 300 ms)",
        "assistant  red   (silent from 2.4 s)",
    ]


def test_every_word_of_the_user_belongs_to_one_user_turn(talks):
    for talk in talks:
        turns = examples.user_turns(talk)
        assert [word for turn in turns for word in turn] == list(talk.user_words)
        assert len(turns) == len(talk.user_end_s)
