"""Cuts, joins, pauses and changes of rate keep the times of words true."""

import numpy as np
import pytest
from tones import pitch, spoken

from jaxtml.data.talks import edits
from jaxtml.stream.timebase import SAMPLE_RATE


def clip_of(text: str) -> edits.Clip:
    tone = spoken(text, "tone:low")
    return edits.Clip(tone.wave, tone.words)


def heard_pitch(clip: edits.Clip, k: int) -> float:
    """Returns the strongest frequency inside word `k`, in Hz."""
    word = clip.words[k]
    part = clip.wave[int(word.start_s * SAMPLE_RATE) : int(word.end_s * SAMPLE_RATE)]
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 1 << 15))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / (1 << 15)


def test_a_pause_shifts_the_later_words_and_is_silent():
    clip = clip_of("what is three plus four")
    paused = edits.insert_pause(clip, 2, 8000)
    assert len(paused.wave) == len(clip.wave) + 8000
    assert paused.words[:2] == clip.words[:2]
    for before, after in zip(clip.words[2:], paused.words[2:], strict=True):
        assert after.start_s == pytest.approx(before.start_s + 0.5, abs=0.02)
    for k, word in enumerate(paused.words):
        assert heard_pitch(paused, k) == pytest.approx(pitch(word.text), abs=3)
    gap = paused.wave[int(paused.words[1].end_s * SAMPLE_RATE) + 400 : int(paused.words[2].start_s * SAMPLE_RATE) - 400]
    assert len(gap) > 7000
    assert np.abs(gap).max() < 1e-3


@pytest.mark.parametrize("rate", [0.9, 0.97, 1.1])
def test_a_faster_clip_is_shorter_and_higher_by_the_same_ratio(rate):
    clip = clip_of("red green")
    faster = edits.change_rate(clip, rate)
    ratio = len(clip.wave) / len(faster.wave)
    assert ratio == pytest.approx(rate, rel=0.01)
    for k, word in enumerate(clip.words):
        assert faster.words[k].end_s == pytest.approx(word.end_s / ratio, abs=1e-3)
        assert heard_pitch(faster, k) == pytest.approx(pitch(word.text) * ratio, rel=0.005)


def test_a_word_is_cut_out_whole_and_alone():
    word = edits.cut_word(clip_of("what is three plus four"), 2)
    assert word.text == "three"
    assert len(word.wave) == pytest.approx(0.3 * SAMPLE_RATE, abs=400)
    assert heard_pitch(word, 0) == pytest.approx(pitch("three"), abs=3)


def test_joined_words_have_their_gaps_between_them():
    words = [edits.cut_word(clip_of(text), 0) for text in ("alpha bravo", "zulu kilo", "red green")]
    clip = edits.join(words, [1600, 3200])
    assert clip.text == "alpha zulu red"
    assert clip.words[1].start_s - clip.words[0].end_s == pytest.approx(0.1, abs=0.02)
    assert clip.words[2].start_s - clip.words[1].end_s == pytest.approx(0.2, abs=0.02)
    for k, word in enumerate(clip.words):
        assert heard_pitch(clip, k) == pytest.approx(pitch(word.text), abs=3)


def test_the_level_of_speech_ignores_silence():
    clip = clip_of("red green")
    paused = edits.insert_pause(clip, 1, 32_000)
    assert edits.speech_level(paused.wave) == pytest.approx(edits.speech_level(clip.wave), rel=0.03)
    assert edits.speech_level(edits.set_level(paused, 0.5).wave) == pytest.approx(0.5, rel=1e-3)


def test_silence_has_no_level_and_stays_silent():
    silent = edits.Clip(np.zeros(1600, np.float32), ())
    assert edits.set_level(silent, 1.0).wave.max() == 0
    assert edits.trim(silent) is silent
