"""Records of micro-turns, and the reply that they make up."""

from __future__ import annotations

import numpy as np

from jaxtml.session.records import MicroTurn, Reply


def test_a_reply_joins_the_pieces_of_its_micro_turns():
    pieces = [(" for", ""), ("ty two", " it"), ("", " is"), (" ", "")]
    turns = tuple(MicroTurn(0, "listen", 0.0, heard, text, "", 1.0) for heard, text in pieces)
    reply = Reply(np.zeros(0, np.float32), turns)
    assert reply.heard == "forty two" and reply.text == "it is"


def test_a_joined_reply_has_each_wave_one_micro_turn_later():
    waves = [np.full(3200, i, np.float32) for i in (1, 2)]
    turns = [MicroTurn(200 * i, "speak", 1.0, "", "", "", 1.0, wave) for i, wave in enumerate(waves)]
    reply = Reply.join(turns, 5000)
    np.testing.assert_array_equal(reply.wave, np.repeat([0, 1], 3200)[:5000])
    for turn, wave in zip(reply.turns, waves, strict=True):
        np.testing.assert_array_equal(turn.wave, wave)


def test_an_event_has_all_of_a_record_except_its_sound():
    event = MicroTurn(200, "speak", 0.75, " forty", " two", "", 9.5, np.ones(3200, np.float32)).event()
    assert list(event.items()) == [
        ("t_ms", 200),
        ("gate", "speak"),
        ("p_speak", 0.75),
        ("heard", " forty"),
        ("text", " two"),
        ("delegate", ""),
        ("step_ms", 9.5),
    ]
