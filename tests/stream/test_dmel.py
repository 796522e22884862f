"""dMel is that of Inkling's released code. A stream gives the same bins as the whole recording, and both are fast."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soxr

from jaxtml.stream import dmel
from jaxtml.stream.audio_file import read_audio

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "goldens" / "make_frontend_golden.py"), run_name="golden")
# The shipped recording of a person and, where they are installed, Debian's pocketsphinx-testdata (read books, single
# words) and asterisk-core-sounds-en-wav (prompts).
HUMAN_SPEECH = (
    ROOT / "jaxtml" / "assets" / "demo" / "human.flac",
    *sorted(Path("/usr/share/pocketsphinx/test/data").glob("**/*.wav")),
    *sorted(Path("/usr/share/asterisk/sounds").glob("en*/*.wav"))[:30],
)


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    """Returns a harmonic tone and noise under a slow envelope, from near silence to loud."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    tone = sum(np.sin(2 * np.pi * 120 * k * t + k) / k for k in range(1, 40))
    envelope = np.maximum(0, np.sin(2 * np.pi * 1.5 * t)) ** 3
    return (envelope * (0.2 * tone + 0.05 * rng.normal(size=t.shape)) + 1e-7 * rng.normal(size=t.shape)).astype("f4")


def edge_values() -> np.ndarray:
    """Returns every float32 within 200 steps of a bin edge, both ends of the range and beyond, and infinities."""
    middles = np.linspace(-6.7, 1.7, 15).astype(np.float32)
    near = middles[:, None] + np.arange(-200, 201) * np.spacing(np.abs(middles))[:, None]
    return np.concatenate([near.ravel(), [-7, 2, -7.1, 2.1, 0.0, -0.0, -1e30, 1e30, -np.inf, np.inf]]).astype("f4")


def released_bins(features):
    """Runs the released quantiser on a torch tensor, without the tokenizer that the released processor wants."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.inkling.processing_inkling")
    centres = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).to(torch.float32)
    holder = SimpleNamespace(bin_centers=centres, dmel_min_value=-7.0, dmel_max_value=2.0)
    return module.InklingProcessor._extract_dmel_bins(holder, features).numpy()


def test_bins_are_those_the_released_extractor_gave():
    golden = np.load(ROOT / "tests" / "golden" / "frontend.npz")
    wave = TOOL["golden_wave"]()
    assert TOOL["checksum"](wave) == str(golden["wave_sha256"]), "this machine makes another input than the golden one"
    frames = dmel.log_mel(wave)
    assert np.abs(frames[::10] - golden["log_mel_every_tenth"]).max() < 0.02  # the released FFT is float32
    differing = np.argwhere(dmel.quantise(frames) != golden["bins"])
    assert len(differing) <= golden["bins"].size // 10_000, differing
    assert len(np.unique(golden["bins"])) >= 12, "the golden wave has too few different bins to test them"


def test_ties_between_bins_fall_as_released():
    golden = np.load(ROOT / "tests" / "golden" / "frontend.npz")
    assert np.array_equal(dmel.quantise(golden["close_to_edges"]), golden["close_to_edges_bins"])


@pytest.mark.oracle
def test_bins_of_human_speech_are_the_released_ones():
    pytest.importorskip("torch")
    extraction = pytest.importorskip("transformers.models.inkling.feature_extraction_inkling")
    extract = extraction.InklingFeatureExtractor()
    total = differing = 0
    for wave in map(read_audio, HUMAN_SPEECH):
        features = extract(wave, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
        ours = dmel.log_mel(wave)
        assert ours.shape == features.shape
        wrong = dmel.quantise(ours) != released_bins(features)
        # The released code computes in float32, with an error. A bin may differ only if this error is larger than the
        # distance from the exact value to the edge of a bin.
        to_edge = np.abs(ours[wrong][:, None] - np.linspace(-6.7, 1.7, 15)).min(axis=-1, initial=1.0)
        assert (to_edge < np.abs(ours - features.numpy())[wrong] + 1e-6).all()
        total, differing = total + wrong.size, differing + int(wrong.sum())
    assert total > 20_000
    assert differing <= total / 10_000, f"{differing} of {total} bins differ"


@pytest.mark.oracle
def test_the_quantiser_is_the_released_one_for_every_value():
    torch = pytest.importorskip("torch")
    values = np.concatenate([edge_values(), np.random.default_rng(0).uniform(-8, 3, 1_000_000).astype("f4")])
    assert np.array_equal(dmel.quantise(values), released_bins(torch.from_numpy(values)))


def test_a_value_falls_into_the_nearest_bin():
    values = np.random.default_rng(1).uniform(-8, 3, (500, 80))
    nearest = np.abs(np.clip(values, -7, 2)[..., None] - np.linspace(-7, 2, 16)).argmin(axis=-1)
    assert np.array_equal(dmel.quantise(values), nearest)
    assert dmel.quantise(values).dtype == np.uint8


def test_the_compiled_quantiser_is_the_same_for_every_value():
    random = np.random.default_rng(2).uniform(-8, 3, 200_000).astype(np.float32)
    values = np.concatenate([random, edge_values()])
    assert np.array_equal(jax.jit(dmel.quantise_jax)(values), dmel.quantise(values))


def test_centres_come_back_to_their_bins():
    bins = np.random.default_rng(3).integers(0, 16, (50, 80), dtype=np.uint8)
    centres = dmel.dequantise(bins)
    assert centres.dtype == np.float32
    assert np.allclose(centres, -7 + 0.6 * bins, atol=1e-6)
    assert np.array_equal(dmel.quantise(centres), bins)


def test_the_stream_makes_the_bins_of_the_whole_wave():
    wave = speechlike(30.0)
    stream, streamed = dmel.DmelStream(), []
    for samples in wave.reshape(-1, 3200):
        stream, bins = stream.step(samples)
        assert bins.shape == (4, 80) and bins.dtype == np.uint8
        streamed.append(bins)
    assert np.array_equal(np.concatenate(streamed), dmel.user_dmel(wave))
    assert len(np.unique(streamed)) >= 12


def test_sound_of_16_bits_is_heard_as_released_and_other_sound_as_if_it_had_been_rounded():
    wave = speechlike(2.0)
    recorded = np.round(wave * 32768).clip(-32768, 32767).astype(np.int16)
    assert np.array_equal(dmel.to_16_bits(recorded / np.float32(32768)) * 32768, recorded)
    assert np.array_equal(dmel.user_dmel(recorded / np.float32(32768)), dmel.quantise(dmel.log_mel(recorded / 32768)))
    assert np.array_equal(dmel.user_dmel(wave), dmel.user_dmel(dmel.to_16_bits(wave)))
    # A resampled call has nothing above 4 kHz. Rounding fills that band, as it does in a recording of 16 bits.
    call = soxr.resample(np.random.default_rng(0).normal(0, 0.05, 16_000).astype(np.float32), 8_000, 16_000)
    assert dmel.quantise(dmel.log_mel(call))[4:-4, 70:].max() == 2
    assert dmel.user_dmel(call)[4:-4, 70:].min() >= 3


def test_a_stream_can_be_stepped_twice_from_the_same_state():
    first, second = speechlike(0.4).reshape(2, 3200)
    stream, _ = dmel.DmelStream().step(first)
    kept = first.copy()
    first[:] = 0  # The caller may use the buffer again.
    _, once = stream.step(second)
    _, again = stream.step(second)
    assert np.array_equal(once, again)
    assert np.array_equal(once, dmel.user_dmel(np.concatenate([kept, second]))[4:])


def test_a_frame_does_not_depend_on_samples_after_it():
    wave = speechlike(2.0)
    changed = wave.copy()
    changed[17 * 800 :] = 0.5
    before, after = dmel.log_mel(wave), dmel.log_mel(changed)
    assert np.array_equal(before[:17], after[:17])
    assert not np.allclose(before[17], after[17], atol=0.1)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 1), (800, 1), (801, 2), (3200, 4), (160_123, 201)])
def test_there_is_a_frame_for_every_hop_that_has_begun(samples: int, frames: int):
    assert dmel.log_mel(np.zeros(samples, np.float32)).shape == (frames, 80)


def test_a_fine_frame_is_centred_on_its_hop():
    wave = np.zeros(8000, np.float32)
    wave[20 * 200 + 100] = 1.0
    loudness = dmel.fine_log_mel(wave).mean(axis=1)
    assert loudness.shape == (40,)
    assert loudness.argmax() == 20
    assert np.allclose(loudness[18:20], loudness[22:20:-1], atol=1e-3)


def test_a_fine_frame_depends_on_its_50_ms_and_no_more():
    wave = speechlike(1.0)
    index = 30
    outside = wave.copy()
    outside[: 200 * index - 300] = outside[200 * index + 500 :] = 0.7
    assert np.array_equal(dmel.fine_log_mel(wave)[index], dmel.fine_log_mel(outside)[index])


def test_fine_and_coarse_frames_agree_about_a_steady_sound():
    """The log-mels of noise differ by a known offset, because a coarse window is twice as long as a fine one.

    The longer window raises the magnitude of noise in each FFT bin by log10(2) / 2. It also has twice as many FFT bins
    in each mel filter, which adds log10(2).
    """
    noise = (0.1 * np.random.default_rng(4).normal(size=16000 * 20)).astype(np.float32)
    coarse, fine = dmel.log_mel(noise)[2:-2].mean(axis=0), dmel.fine_log_mel(noise)[8:-8].mean(axis=0)
    assert np.abs(coarse - fine - (np.log10(2) / 2 + np.log10(2))).max() < 0.1


def test_audio_of_another_shape_is_refused():
    for call in (dmel.log_mel, dmel.fine_log_mel, dmel.DmelStream().step):
        with pytest.raises(ValueError, match="one-dimensional"):
            call(np.zeros((3200, 2), np.float32))
    with pytest.raises(ValueError, match="3200"):
        dmel.DmelStream().step(np.zeros(1600, np.float32))
    with pytest.raises(ValueError, match="multiple of 200"):
        dmel.fine_log_mel(np.zeros(300, np.float32))


def test_every_filter_has_its_own_peak_and_together_they_fill_the_band():
    for n_fft in (800, 1600):
        filters = dmel.mel_filterbank(n_fft)
        assert filters.shape == (n_fft // 2 + 1, 80)
        peak_hz = filters.argmax(axis=0) * 16000 / n_fft
        assert (np.diff(peak_hz) > 0).all() and peak_hz[0] < 60 and peak_hz[-1] > 7500
        assert np.allclose(filters.sum(axis=0) * 16000 / n_fft, 1.0, atol=0.25)  # Slaney: unit area in hertz


def test_a_minute_of_audio_takes_well_under_a_second():
    wave = speechlike(60.0)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        dmel.quantise(dmel.log_mel(wave))
        best = min(best, time.perf_counter() - start)
    assert best < 0.5  # measured 0.03 s on one core; room for a busy machine
