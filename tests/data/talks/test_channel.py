"""The channel changes the voice by as much as its attributes say."""

import numpy as np
import pytest

from jaxtml.data.talks import channel
from jaxtml.data.talks.channel import Channel
from jaxtml.data.talks.line import Line
from jaxtml.stream.timebase import SAMPLE_RATE

N = 10 * SAMPLE_RATE


def talking(seed: int = 0) -> np.ndarray:
    """Returns `[N]` white noise at unit level for the first half, then silence."""
    voice = np.random.default_rng(seed).standard_normal(N).astype(np.float32)
    voice[N // 2 :] = 0
    return voice


def level_db(wave: np.ndarray) -> float:
    return 20 * np.log10(np.sqrt(np.mean(np.square(wave, dtype=np.float64))) + 1e-12)


def heard_through(**figures) -> np.ndarray:
    return channel.apply_channel(np.random.default_rng(1), Channel(**figures), talking())


def test_the_clean_channel_only_sets_the_level():
    heard = heard_through(level_dbfs=-26.0)
    np.testing.assert_allclose(heard, talking() * 10 ** (-26 / 20), atol=2e-5)  # half a step of 16 bits


@pytest.mark.parametrize("tilt", [0.0, -3.0, -6.0])
def test_noise_lies_below_the_voice_by_noise_db(tilt):
    heard = heard_through(level_dbfs=-26.0, noise_db=15.0, noise_tilt=tilt)
    assert level_db(heard[N // 2 :]) == pytest.approx(-26 - 15, abs=3)


def test_a_telephone_passes_its_band_and_nothing_else():
    power = np.square(np.abs(np.fft.rfft(heard_through(low_cut_hz=300.0, high_cut_hz=3400.0)[: N // 2])))
    freqs = np.fft.rfftfreq(N // 2, 1 / SAMPLE_RATE)
    inside = power[(freqs > 800) & (freqs < 3000)].mean()
    assert power[freqs > 4000].mean() < inside * 1e-2
    assert power[(freqs > 20) & (freqs < 100)].mean() < inside * 0.05


def test_a_room_rings_after_the_voice_and_no_longer_than_its_decay():
    heard = heard_through(level_dbfs=-20.0, rt60_s=0.3, direct_db=3.0)
    end = N // 2
    assert level_db(heard[end : end + 800]) > -45
    assert level_db(heard[end + 4800 : end + 8000]) < -75
    quiet_before = channel.apply_channel(np.random.default_rng(1), Channel(rt60_s=0.4), talking()[::-1].copy())
    assert level_db(quiet_before[: N // 2 - 10]) < -80, "the tail wrapped round to the start"


def test_the_loudspeaker_is_heard_in_the_microphone_after_its_delay():
    assistant = np.zeros(N, np.float32)
    assistant[120_000:140_000] = 0.06 * np.random.default_rng(3).standard_normal(20_000)
    with_echo = Channel(level_dbfs=-26.0, echo_db=20.0, echo_delay=800)
    heard = channel.apply_channel(np.random.default_rng(1), with_echo, np.zeros(N, np.float32), assistant)
    assert np.abs(heard[:120_800]).max() < 1e-6
    assert -60 < level_db(heard[120_800:140_800]) < -40


def test_a_resonance_raises_the_sound_around_its_frequency():
    flat, resonant = (heard_through(resonances=r)[: N // 2] for r in ((), ((2000.0, 9.0, 0.2),)))
    power = np.square(np.abs(np.fft.rfft(resonant))) / np.square(np.abs(np.fft.rfft(flat)))
    freqs = np.fft.rfftfreq(N // 2, 1 / SAMPLE_RATE)
    assert 10 * np.log10(np.median(power[np.abs(freqs - 2000) < 50])) == pytest.approx(9, abs=0.5)
    assert 10 * np.log10(np.median(power[np.abs(freqs - 500) < 50])) == pytest.approx(0, abs=0.2)


def test_only_hard_channels_have_a_line_and_resonances():
    usual = [channel.draw_channel(np.random.default_rng(seed)) for seed in range(100)]
    assert all(drawn.line == Line() and not drawn.resonances and drawn.direct_db >= 2 for drawn in usual)
    hard = [channel.draw_channel(np.random.default_rng(seed), hard=1.0) for seed in range(100)]
    assert sum(drawn.line != Line() for drawn in hard) > 50
    assert any(drawn.direct_db < -3 and drawn.rt60_s is not None for drawn in hard)
    assert any(drawn.echo_db is not None and drawn.echo_db < 5 for drawn in hard)


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_a_drawn_channel_repeats_with_its_seed_and_keeps_samples_in_range(hard):
    for seed in range(20):
        drawn = channel.draw_channel(np.random.default_rng(seed), hard)
        assert drawn == channel.draw_channel(np.random.default_rng(seed), hard)
        heard = channel.apply_channel(np.random.default_rng(seed), drawn, talking(), talking(5) * 0.1, talking(6))
        assert heard.dtype == np.float32
        assert heard.shape == (N,)
        assert np.isfinite(heard).all()
        assert np.abs(heard).max() <= 1.0
