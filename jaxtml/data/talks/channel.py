"""The channel from the user's mouth to our samples: the room, the microphone and the line. Pure numpy.

`Channel` describes the whole effect by numbers, so that tests can check it. `draw_channel` draws one at random,
once per session. `apply_channel` turns the clean voice into what the microphone hears. Reverberation, equalisation and
band limits are one multiplication in the frequency domain: four transforms per session. Called by
`jaxtml.data.talks.mix` and `jaxtml.data.talks.recorded_prompts`.

Axis glossary: N samples of the session, F bins of its one-sided spectrum, R samples of a room's impulse response.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from jaxtml.data.talks.line import Line, apply_line, draw_line
from jaxtml.stream.dmel import to_16_bits
from jaxtml.stream.timebase import SAMPLE_RATE

_TAIL = 6400  # samples of padding behind the session, so that the circular convolution does not wrap into its start
_DECAY = 13.8  # 60 dB as a natural logarithm of energy


@dataclass(frozen=True)
class Channel:
    """The channel from the user's mouth to our samples. None means that a part is absent.

    Attributes:
      level_dbfs: level of the speech in dB of full scale. Near -10 its peaks clip.
      rt60_s: reverberation time, the seconds in which the reverberation decays by 60 dB.
      direct_db: dB by which the reverberation lies below the direct sound.
      noise_db: dB by which noise lies below the voice.
      noise_tilt: slope of the noise's spectrum in dB per octave (0 white, -6 brown).
      babble_db: dB by which the talk of other people lies below the voice.
      hum_db: dB by which mains hum lies below the voice.
      hum_hz: frequency of the hum.
      echo_db: dB by which the assistant's voice from the loudspeaker lies below the user's.
      echo_delay: samples by which that echo is late.
      low_cut_hz, high_cut_hz: the band that passes.
      tilt: slope of the microphone in dB per octave around 1 kHz.
      resonances: `(frequency in Hz, gain in dB, width in octaves)` of each resonance of the microphone and its case.
      dc: constant offset of the samples.
      line: what happens behind the microphone.
    """

    level_dbfs: float = -26.0
    rt60_s: float | None = None
    direct_db: float = 10.0
    noise_db: float | None = None
    noise_tilt: float = 0.0
    babble_db: float | None = None
    hum_db: float | None = None
    hum_hz: float = 50.0
    echo_db: float | None = None
    echo_delay: int = 400
    low_cut_hz: float | None = None
    high_cut_hz: float | None = None
    tilt: float = 0.0
    resonances: tuple[tuple[float, float, float], ...] = ()
    dc: float = 0.0
    line: Line = Line()


CLEAN = Channel()
"""Changes nothing but the level, which it sets to -26 dBFS."""


def draw_channel(rng: np.random.Generator, hard: float = 0.0) -> Channel:
    """Draws a channel, from a clean studio to a noisy telephone.

    Args:
      rng: everything random comes from this generator.
      hard: chance of a channel that most recordings do not have: far from the microphone, a resonant case, the echo of
        a loudspeaker as loud as the user, a codec, automatic gain, lost packets.
    """
    channel = _draw_usual_channel(rng)
    return _make_hard(rng, channel) if rng.random() < hard else channel


def _make_hard(rng: np.random.Generator, channel: Channel) -> Channel:
    """Returns the channel with some of the hard conditions that `draw_channel` names."""
    if rng.random() < 0.25:  # The user is metres away: more of the room than of the voice, and less treble.
        channel = replace(
            channel,
            rt60_s=float(rng.uniform(0.25, 0.7)),
            direct_db=float(rng.uniform(-6, 3)),
            tilt=channel.tilt - float(rng.uniform(0, 2)),
        )
    if rng.random() < 0.5:
        count = int(rng.integers(1, 5))
        centres = np.exp(rng.uniform(np.log(150), np.log(7000), count))
        gains, widths = rng.uniform(-12, 9, count), rng.uniform(0.1, 0.8, count)
        channel = replace(
            channel, resonances=tuple(zip(centres.tolist(), gains.tolist(), widths.tolist(), strict=True))
        )
    if rng.random() < 0.2:
        channel = replace(channel, echo_db=float(rng.uniform(0, 20)))
    if rng.random() < 0.7:
        channel = replace(channel, line=draw_line(rng))
    return channel


def _draw_usual_channel(rng: np.random.Generator) -> Channel:

    def maybe(chance: float, low: float, high: float) -> float | None:
        value = float(rng.uniform(low, high))
        return value if rng.random() < chance else None

    loudness = rng.random()
    if loudness < 0.15:
        level = rng.uniform(-45, -33)
    elif loudness < 0.9:
        level = rng.uniform(-33, -17)
    else:
        level = rng.uniform(-17, -10)
    # Telephones and 8 kHz recordings pass nothing above 3.4 to 3.9 kHz. Cheap microphones and codecs have some higher
    # limit.
    narrow, high_cut = rng.random(), None
    if narrow < 0.35:
        high_cut = float(rng.uniform(3300, 3950))
    elif narrow < 0.55:
        high_cut = float(rng.uniform(3950, 7600))
    return Channel(
        level_dbfs=float(level),
        rt60_s=maybe(0.55, 0.08, 0.5),
        direct_db=float(rng.uniform(2, 18)),
        noise_db=maybe(0.8, 5, 45),
        noise_tilt=float(rng.uniform(-6, 0)),
        babble_db=maybe(0.12, 12, 35),
        hum_db=maybe(0.15, 15, 45),
        hum_hz=50.0 if rng.random() < 0.5 else 60.0,
        echo_db=maybe(0.15, 20, 45),
        echo_delay=int(rng.integers(80, 1600)),
        low_cut_hz=maybe(0.45, 50, 320),
        high_cut_hz=high_cut,
        tilt=float(rng.uniform(-3, 3)),
        dc=float(rng.uniform(-0.004, 0.004)) if rng.random() < 0.3 else 0.0,
    )


def _fast_length(n: int) -> int:
    """Returns the next length from `n` on whose transform is fast: a power of two times 1, 3, 5, 9 or 15."""
    return min(odd << max((-(-n // odd) - 1).bit_length(), 0) for odd in (1, 3, 5, 9, 15))


def _response(channel: Channel, freqs: np.ndarray) -> np.ndarray:
    """Returns `[F]` float32 the gain of the microphone and the telephone line at `freqs` in Hz."""
    octaves = np.log2(np.maximum(freqs, 50.0) / 1000.0)
    gain_db = channel.tilt * octaves
    for centre_hz, db, width in channel.resonances:
        gain_db = gain_db + np.float32(db) * np.exp(-0.5 * ((octaves - np.log2(centre_hz / 1000.0)) / width) ** 2)
    gain = 10 ** (gain_db / 20)
    if channel.low_cut_hz is not None:
        gain = gain / np.sqrt(1 + (channel.low_cut_hz / np.maximum(freqs, 1.0)) ** 4)  # a second-order filter
    if channel.high_cut_hz is not None:
        gain = gain / np.sqrt(1 + (freqs / channel.high_cut_hz) ** 40)  # as steep as a resampler
    return gain.astype(np.float32)


def _room(rng: np.random.Generator, rt60_s: float, direct_db: float) -> np.ndarray:
    """Draws `[R]` float32 an impulse response: the direct sound, then noise that decays by 60 dB in `rt60_s`."""
    n = min(int(rt60_s * SAMPLE_RATE), _TAIL)
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE
    tail = rng.standard_normal(n, dtype=np.float32) * np.exp(-_DECAY / 2 * t / rt60_s)
    tail[: int(rng.integers(16, 80))] = 0  # nothing arrives before the first reflection
    tail *= 10 ** (-direct_db / 20) / max(float(np.sqrt(np.sum(tail**2))), 1e-9)
    tail[0] = 1.0
    return tail


def _noise_spectrum(rng: np.random.Generator, tilt: float, freqs: np.ndarray, n: int) -> np.ndarray:
    """Draws `[F]` complex64 the spectrum of `n` samples of noise: unit power, `tilt` dB per octave above 50 Hz."""
    shape = (np.maximum(freqs, 50.0) / 1000.0) ** np.float32(tilt / 6.02)
    shape = shape * np.float32(n / np.sqrt(2 * np.sum(shape**2, dtype=np.float64)))
    phase = rng.standard_normal((2, len(freqs)), dtype=np.float32)
    return (shape * np.float32(np.sqrt(0.5))) * (phase[0] + 1j * phase[1])


def _swell(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draws `[N]` float32 a gain that changes the loudness of noise slowly, within about +-4 dB."""
    steps = -(-n // 16)  # One step per millisecond is smooth enough, and 16 times cheaper than one per sample.
    knots = rng.uniform(-4, 4, size=max(n // 24_000, 2))
    gain = 10 ** (np.interp(np.arange(steps), np.linspace(0, steps, len(knots)), knots) / 20)
    return np.repeat(gain.astype(np.float32), 16)[:n]


def apply_channel(
    rng: np.random.Generator,
    channel: Channel,
    voice: np.ndarray,
    assistant: np.ndarray | None = None,
    babble: np.ndarray | None = None,
) -> np.ndarray:
    """Returns what the microphone hears.

    Args:
      rng: draws the impulse response of the room and the noises.
      channel: what is done to the voice.
      voice: `[N]` float32, the user's clean voice with its speech at unit level (root mean square 1).
      assistant: `[N]` float32, the assistant's voice as played, for the echo.
      babble: `[N]` float32, the talk of other people at unit level.

    Returns:
      `[N]` float32 within [-1, 1], rounded to 16 bits.
    """
    n = len(voice)
    length = _fast_length(n + _TAIL)
    freqs = np.fft.rfftfreq(length, 1 / SAMPLE_RATE).astype(np.float32)
    gain = _response(channel, freqs)

    dry = voice.astype(np.float32, copy=True)
    if babble is not None and channel.babble_db is not None:
        dry += babble * np.float32(10 ** (-channel.babble_db / 20))
    if assistant is not None and channel.echo_db is not None:
        level = max(float(np.abs(assistant).max()), 1e-6) / 6  # a voice peaks at about six times its level
        echo_gain = np.float32(10 ** (-channel.echo_db / 20) / level)
        dry[channel.echo_delay :] += assistant[: n - channel.echo_delay] * echo_gain
    spectrum = np.fft.rfft(dry, length) * gain
    if channel.rt60_s is not None:
        spectrum *= np.fft.rfft(_room(rng, channel.rt60_s, channel.direct_db), length)
    heard = np.fft.irfft(spectrum, length)[:n].astype(np.float32)

    if channel.noise_db is not None:
        noise = np.fft.irfft(_noise_spectrum(rng, channel.noise_tilt, freqs, length) * gain, length)[:n]
        heard += noise.astype(np.float32) * _swell(rng, n) * np.float32(10 ** (-channel.noise_db / 20))
    if channel.hum_db is not None:
        phase = np.arange(n, dtype=np.float32) * np.float32(2 * np.pi * channel.hum_hz / SAMPLE_RATE)
        hum = sum(np.sin(k * phase + np.float32(rng.uniform(0, 6.28))) / np.float32(k) for k in (1, 2, 3))
        heard += hum * np.float32(10 ** (-channel.hum_db / 20))
    heard *= np.float32(10 ** (channel.level_dbfs / 20))
    # A microphone clips what is too loud. The rounding is the one that every session's sound goes through.
    heard = np.clip(heard + np.float32(channel.dc), -1.0, 1.0)
    if channel.line != Line():
        heard = np.clip(apply_line(rng, channel.line, heard), -1.0, 1.0)
    return to_16_bits(heard)
