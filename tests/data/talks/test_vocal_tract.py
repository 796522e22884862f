"""A reshaped voice is another speaker: formants, pitch and tempo move each by its own factor, and words stay timed."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtml.data.talks import vocal_tract
from jaxtml.data.talks.edits import Clip
from jaxtml.data.talks.vocal_tract import VocalTract, reshape
from jaxtml.stream.conversation import Word
from jaxtml.stream.timebase import SAMPLE_RATE

PITCH_HZ, FORMANT_HZ = 125.0, 1500.0


def vowel(seconds: float = 1.0) -> Clip:
    """Returns pulses at `PITCH_HZ` through a resonance at `FORMANT_HZ`, as one word."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    harmonics = np.arange(1, 60) * PITCH_HZ
    gains = 1 / (1 + ((harmonics - FORMANT_HZ) / 200) ** 2)
    wave = 0.1 * sum(gain * np.cos(2 * np.pi * hz * t) for gain, hz in zip(gains, harmonics, strict=True))
    return Clip(wave.astype(np.float32), (Word("a", 0.0, seconds),))


def pitch_hz(wave: np.ndarray) -> float:
    middle = wave[len(wave) // 2 - 1600 : len(wave) // 2 + 1600]
    likeness = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return SAMPLE_RATE / (60 + int(np.argmax(likeness[60:240])))


def formant_hz(wave: np.ndarray) -> float:
    """Returns the centre of the strongest region of the spectrum, over which harmonics are smoothed away."""
    power = np.square(np.abs(np.fft.rfft(wave * np.hanning(len(wave)))))
    freqs = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    smooth = np.array([power[np.abs(freqs - hz) < 150].sum() for hz in np.arange(500, 3000, 20)])
    return 500 + 20 * float(np.argmax(smooth))


def test_a_speaker_like_the_recorded_one_leaves_the_sound_as_it_is():
    clip = vowel()
    assert reshape(clip, VocalTract()) == clip
    same = vocal_tract._warp_envelope(clip.wave, VocalTract())
    np.testing.assert_allclose(same, clip.wave, atol=1e-5)


@pytest.mark.parametrize(
    "tract",
    [VocalTract(formants=1.2), VocalTract(formants=0.85), VocalTract(pitch=1.25), VocalTract(pitch=0.8),
     VocalTract(tempo=1.3), VocalTract(tempo=0.75), VocalTract(formants=1.1, pitch=0.85, tempo=1.2)],
)  # fmt: skip
def test_formants_pitch_and_tempo_move_each_by_its_own_factor(tract):
    changed = reshape(vowel(), tract)
    assert pitch_hz(changed.wave) == pytest.approx(PITCH_HZ * tract.pitch, rel=0.04)
    assert formant_hz(changed.wave) == pytest.approx(FORMANT_HZ * tract.formants, rel=0.1)
    assert len(changed.wave) == pytest.approx(SAMPLE_RATE / tract.tempo, rel=0.02)


def test_words_stay_where_they_are_heard():
    two = np.concatenate([vowel(0.4).wave, np.zeros(4800, np.float32), vowel(0.5).wave])
    clip = Clip(two, (Word("a", 0.0, 0.4), Word("b", 0.7, 1.2)))
    for seed in range(8):
        changed = reshape(clip, vocal_tract.draw_vocal_tract(np.random.default_rng(seed)))
        loud = np.abs(changed.wave) > 0.02
        gap_s = (np.flatnonzero(np.diff(np.flatnonzero(loud)) > 2000)[:1] + 1, len(changed.wave) / SAMPLE_RATE)
        before, after = np.flatnonzero(loud)[gap_s[0] - 1], np.flatnonzero(loud)[gap_s[0]]
        assert before / SAMPLE_RATE == pytest.approx([changed.words[0].end_s], abs=0.03)
        assert after / SAMPLE_RATE == pytest.approx([changed.words[1].start_s], abs=0.03)
        assert changed.words[1].end_s == pytest.approx(gap_s[1], abs=0.03)


def test_drawn_speakers_differ_and_repeat_with_their_seed():
    drawn = [vocal_tract.draw_vocal_tract(np.random.default_rng(seed)) for seed in range(300)]
    assert drawn[3] == vocal_tract.draw_vocal_tract(np.random.default_rng(3))
    formants, pitch, tempo = (np.array([getattr(d, name) for d in drawn]) for name in ("formants", "pitch", "tempo"))
    assert formants.min() > 0.83 and formants.max() < 1.23 and formants.std() > 0.05
    assert pitch.min() > 0.77 and pitch.max() < 1.29 and pitch.std() > 0.09
    assert tempo.min() >= 0.75 and tempo.max() <= 1.3
    assert abs(np.corrcoef(formants, pitch)[0, 1]) < 0.2


def test_short_and_silent_clips_stay_finite():
    tract = vocal_tract.draw_vocal_tract(np.random.default_rng(5))
    for wave in (np.zeros(8000, np.float32), vowel(0.05).wave):
        changed = reshape(Clip(wave, ()), tract)
        assert np.isfinite(changed.wave).all()


def test_a_voice_is_the_same_to_the_bit_for_any_number_of_threads():
    """BLAS splits large products among its threads, and each split rounds in its own way."""
    code = (
        "import hashlib, numpy as np\n"
        "from jaxtml.data.talks.vocal_tract import VocalTract, _warp_envelope\n"
        "wave = np.random.default_rng(0).normal(0, 0.1, 80_000).astype(np.float32)\n"
        "tract = VocalTract(formants=1.1, bend=(1.02, 0.97, 1.05), sharpness=1.1)\n"
        "print(hashlib.sha256(_warp_envelope(wave, tract).tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"OPENBLAS_NUM_THREADS": threads}, text=True,
            capture_output=True, check=True,
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
