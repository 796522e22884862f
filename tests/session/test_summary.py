"""A session in figures."""

from __future__ import annotations

import numpy as np

from jaxtml.session.records import MicroTurn, Reply
from jaxtml.session.summary import summarise

SAMPLES = 3200  # of a micro-turn


def micro_turn(index: int, gate: str, heard: str = "", text: str = "", step_ms: float = 10.0) -> MicroTurn:
    return MicroTurn(200 * index, gate, 0.5, heard, text, "", step_ms)


def test_latency_runs_from_the_users_last_sound_to_the_first_sound_of_the_reply():
    wave = np.zeros(10 * SAMPLES, np.float32)
    wave[:9600] = 0.3 * np.sin(np.arange(9600) / 5)  # the user ends at 0.6 s
    gates = ["listen"] * 4 + ["speak"] * 3 + ["listen"] * 3  # opens in micro-turn 4, heard from 1.0 s
    turns = tuple(micro_turn(i, gate) for i, gate in enumerate(gates))
    summary = summarise(wave, Reply(np.zeros_like(wave), turns))
    assert summary.replies == 1
    assert abs(summary.gate_latency_ms[0] - 400) <= 10
    assert summary.seconds == 2.0


def test_words_of_all_micro_turns_are_joined_and_late_steps_counted():
    turns = (
        micro_turn(0, "listen", " forty"),
        micro_turn(1, "speak", " two", " forty", 210.0),
        micro_turn(2, "speak", text=" two"),
    )
    summary = summarise(np.zeros(3 * SAMPLES, np.float32), Reply(np.zeros(3 * SAMPLES, np.float32), turns))
    assert (summary.heard, summary.said) == ("forty two", "forty two")
    assert summary.late_turns == 1
    assert summary.step_ms_max == 210.0
    assert summary.gate_latency_ms == (), "the user was silent, so there is no end to measure from"


def test_the_sentence_of_a_silent_session_says_what_to_try():
    silence = np.zeros(SAMPLES, np.float32)
    summary = summarise(silence, Reply(silence, (micro_turn(0, "listen"),)))
    assert "said nothing" in summary.sentence()
    assert "silence after the question" in summary.sentence()
