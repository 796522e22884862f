"""A line does to the sound what its attributes say, and keeps its length and its clock."""

import numpy as np
import pytest

from jaxtml.data.talks import line
from jaxtml.data.talks.line import Line, apply_line
from jaxtml.stream.timebase import SAMPLE_RATE

N = 4 * SAMPLE_RATE


def tone(level: float = 0.1, hz: float = 700.0) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(N) / SAMPLE_RATE)).astype(np.float32)


def through(wave: np.ndarray, **figures) -> np.ndarray:
    return apply_line(np.random.default_rng(0), Line(**figures), wave)


def test_a_line_without_faults_changes_nothing():
    np.testing.assert_array_equal(through(tone()), tone())


@pytest.mark.parametrize("codec", [*line.TELEPHONE_CODECS, "opus"])
def test_a_codec_keeps_the_clock_and_most_of_the_sound(codec):
    decoded = through(tone(), codec=codec)
    assert decoded.shape == (N,) and decoded.dtype == np.float32
    error = decoded[3200:-3200] - tone()[3200:-3200]
    assert 0 < np.std(error) < 0.35 * np.std(tone()), "also a shift of a few samples would be an error"


def test_a_telephone_passes_nothing_above_four_kilohertz():
    noise = np.random.default_rng(1).normal(0, 0.1, N).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(through(noise, codec="pcmu"))))
    assert power[len(power) * 9 // 16 :].mean() < 1e-4 * power[: len(power) * 7 // 16].mean()


def test_automatic_gain_brings_quiet_speech_up_and_leaves_silence_alone():
    raised = through(tone(0.04), gain_dbfs=-20.0)
    last = raised[-SAMPLE_RATE:]
    assert 20 * np.log10(np.sqrt(np.mean(last**2))) == pytest.approx(-20, abs=1.5)
    lowered = through(tone(0.9), gain_dbfs=-20.0)[-SAMPLE_RATE:]
    assert 20 * np.log10(np.sqrt(np.mean(lowered**2))) == pytest.approx(-20, abs=1.5)
    hiss = np.random.default_rng(2).normal(0, 1e-4, N).astype(np.float32)
    np.testing.assert_allclose(through(hiss, gain_dbfs=-20.0), hiss, rtol=1e-4)


@pytest.mark.parametrize("burst", [1.0, 3.0])
def test_as_many_packets_are_lost_as_the_line_says(burst):
    lost = (through(np.tile(tone(), 20), loss=0.05, burst=burst, conceals=False).reshape(-1, 320) == 0).all(axis=1)
    assert lost.mean() == pytest.approx(0.05, abs=0.015)
    assert lost.sum() / (np.diff(lost.astype(int)) == 1).sum() == pytest.approx(burst, rel=0.25)


def test_concealed_packets_repeat_the_sound_before_them():
    wave = np.random.default_rng(3).normal(0, 0.1, N).astype(np.float32)
    heard = through(wave, loss=0.1, conceals=True)
    changed = np.flatnonzero((heard != wave).reshape(-1, 320).any(axis=1))
    assert len(changed) > 5
    first = changed[0]
    np.testing.assert_allclose(heard.reshape(-1, 320)[first], 0.7 * wave.reshape(-1, 320)[first - 1])


def test_drawn_lines_have_every_fault():
    drawn = [line.draw_line(np.random.default_rng(seed)) for seed in range(200)]
    assert {d.codec for d in drawn} == {None, "opus", *line.TELEPHONE_CODECS}
    assert any(d.loss > 0.03 for d in drawn) and any(d.gain_dbfs is not None for d in drawn)
    assert drawn[7] == line.draw_line(np.random.default_rng(7))
