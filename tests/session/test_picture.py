"""The picture of a session."""

from __future__ import annotations

import matplotlib.image
import numpy as np

from jaxtml.session.picture import draw
from jaxtml.session.records import MicroTurn, Reply

SAMPLES = 3200  # of a micro-turn


def test_the_picture_of_a_long_session_is_as_wide_as_the_picture_of_two_minutes(tmp_path):
    turns = tuple(
        MicroTurn(200 * i, "speak" if i % 10 == 0 else "listen", 0.5, " forty", "", "", 10.0) for i in range(650)
    )
    wave = np.zeros(650 * SAMPLES, np.float32)
    draw(tmp_path / "long.png", wave, Reply(wave, turns))
    assert matplotlib.image.imread(tmp_path / "long.png").shape[1] == 160 * 110
    draw(tmp_path / "short.png", wave[: 20 * SAMPLES], Reply(wave[: 20 * SAMPLES], turns[:20]))
    assert matplotlib.image.imread(tmp_path / "short.png").shape[1] == 9 * 110


def test_words_with_dollar_signs_are_no_formulas_and_the_name_decides_the_format(tmp_path):
    wave = np.zeros(2 * SAMPLES, np.float32)
    turns = (MicroTurn(0, "listen", 0.5, "$5 and ^ $", "$_", "", 10.0), MicroTurn(200, "listen", 0.5, "", "", "", 10.0))
    for name, beginning in (("a.svg", b"<?xml"), ("a.PDF", b"%PDF"), ("a.jpeg", b"\xff\xd8"), ("a", b"\x89PNG")):
        draw(tmp_path / name, wave, Reply(wave, turns))
        assert (tmp_path / name).read_bytes().startswith(beginning)
