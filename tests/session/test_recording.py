"""A session over a recording, in figures."""

import matplotlib.image
import numpy as np

from jaxtml.session.engine import MicroTurn, Reply
from jaxtml.session.recording import draw, summarise

TURN = 3200


def turn(index: int, gate: str, heard: str = "", text: str = "", step_ms: float = 10.0) -> MicroTurn:
    return MicroTurn(200 * index, gate, 0.5, heard, text, "", step_ms)


def test_latency_runs_from_the_users_last_sound_to_the_first_sound_of_the_reply():
    wave = np.zeros(10 * TURN, np.float32)
    wave[:9600] = 0.3 * np.sin(np.arange(9600) / 5)  # the user ends at 0.6 s
    gates = ["listen"] * 4 + ["speak"] * 3 + ["listen"] * 3  # opens in micro-turn 4, heard from 1.0 s
    turns = tuple(turn(i, gate) for i, gate in enumerate(gates))
    summary = summarise(wave, Reply(np.zeros_like(wave), turns))
    assert summary.replies == 1
    assert abs(summary.gate_latency_ms[0] - 400) <= 10
    assert summary.seconds == 2.0


def test_words_of_all_micro_turns_are_joined_and_late_steps_counted():
    turns = (turn(0, "listen", " forty"), turn(1, "speak", " two", " forty", 210.0), turn(2, "speak", text=" two"))
    summary = summarise(np.zeros(3 * TURN, np.float32), Reply(np.zeros(3 * TURN, np.float32), turns))
    assert (summary.heard, summary.said) == ("forty two", "forty two")
    assert summary.late_turns == 1
    assert summary.step_ms_max == 210.0
    assert summary.gate_latency_ms == (), "nobody spoke before it"


def test_a_silent_session_says_what_to_try():
    summary = summarise(np.zeros(TURN, np.float32), Reply(np.zeros(TURN, np.float32), (turn(0, "listen"),)))
    assert "said nothing" in summary.sentence()
    assert "silence after the question" in summary.sentence()


def test_the_picture_of_a_long_session_stays_as_wide_as_one_of_two_minutes(tmp_path):
    turns = tuple(turn(i, "speak" if i % 10 == 0 else "listen", " forty") for i in range(650))
    wave = np.zeros(650 * TURN, np.float32)
    draw(tmp_path / "long.png", wave, Reply(wave, turns))
    assert matplotlib.image.imread(tmp_path / "long.png").shape[1] == 160 * 110
    draw(tmp_path / "short.png", wave[: 20 * TURN], Reply(wave[: 20 * TURN], turns[:20]))
    assert matplotlib.image.imread(tmp_path / "short.png").shape[1] == 9 * 110
