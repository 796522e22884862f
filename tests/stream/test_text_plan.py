"""Text tokens stand in their micro-turn, or in the next ones with room. A word that does not fit is left out whole."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.config import DuplexConfig
from jaxtml.stream.conversation import Conversation, Speech, Word
from jaxtml.stream.text_plan import plan_text, plan_typed
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES

DELAY_MS, LEAD_MS = 120, 200


@pytest.fixture(scope="module")
def limits(small) -> DuplexConfig:
    return small.duplex


def silence(micro_turns: int, **known) -> Conversation:
    wave = np.zeros(micro_turns * MICRO_TURN_SAMPLES, np.float32)
    return Conversation(wave, wave, **known)


def test_a_long_word_continues_in_the_next_micro_turns(codec, limits):
    long = "abcdefg"  # a space and seven letters
    talk = silence(8, user_words=(Word(long, 0.0, 0.3), Word("xy", 0.3, 0.35)))
    heard = [t.heard for t in plan_text(talk, codec, limits, heard_delay_ms=DELAY_MS, lead_ms=LEAD_MS)]
    assert [len(tokens) for tokens in heard] == [0, 0, 3, 3, 3, 2, 0, 0]
    assert [token for tokens in heard for token in tokens] == codec.encode(long) + codec.encode("xy")


def test_a_word_that_does_not_fit_before_the_end_is_left_out_whole(codec, limits):
    talk = silence(4, user_words=(Word("xy", 0.0, 0.3), Word("abcdefg", 0.3, 0.4)))
    heard = [t.heard for t in plan_text(talk, codec, limits, heard_delay_ms=DELAY_MS, lead_ms=LEAD_MS)]
    assert [token for tokens in heard for token in tokens] == codec.encode("xy")


def test_the_assistant_writes_nothing_outside_its_stretch_of_speech(codec, limits):
    words = (Word("xy", 0.4, 0.5), Word("abcdefg", 0.6, 0.7))
    talk = silence(6, speech=(Speech(1, 3, words),))
    text = [t.text for t in plan_text(talk, codec, limits, heard_delay_ms=DELAY_MS, lead_ms=10_000)]
    assert [bool(tokens) for tokens in text] == [False, True, False, False, False, False]
    assert list(text[1]) == codec.encode("xy")


def test_typed_text_without_room_continues_in_the_next_micro_turn(codec, limits):
    ids, room = codec.encode("too long to type"), limits.max_typed - 1
    assert len(ids) > room
    plan = plan_typed([(1, "too long to type")], codec, limits, -(-len(ids) // room) + 2)
    assert [token for tokens in plan for token in tokens] == ids
    lengths = [len(tokens) for tokens in plan]
    assert lengths[0] == 0 and max(lengths) == room and sum(n == room for n in lengths) == len(ids) // room
