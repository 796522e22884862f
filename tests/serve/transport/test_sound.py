"""Sound in the formats of protocols: what goes in comes out, in pieces as at once, for as long as it lasts."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.serve.transport.sound import SoundDecoder, SoundEncoder, SoundFormat
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

FORMATS = [SoundFormat("pcm", 16000), SoundFormat("pcm", 24000), SoundFormat("pcmu", 8000), SoundFormat("pcma", 8000)]
TURNS = 10


@pytest.fixture(scope="module")
def tone() -> np.ndarray:
    """Two seconds of a voice's pitch and one of its formants."""
    t = np.arange(TURNS * MICRO_TURN_SAMPLES) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 180 * t) + 0.1 * np.sin(2 * np.pi * 1900 * t)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_there_and_back_is_the_same_sound_a_little_later(format, tone):
    out, back = SoundEncoder(format), SoundDecoder(format)
    pieces = [out.encode(tone[at : at + MICRO_TURN_SAMPLES]) for at in range(0, len(tone), MICRO_TURN_SAMPLES)]
    assert {len(piece) for piece in pieces} == {format.rate // 5 * format.width}, "200 ms each"
    assert 0 <= out.delay_ms < 7
    heard = np.concatenate([back.decode(piece) for piece in pieces])
    most = SAMPLE_RATE // 10
    middle = slice(SAMPLE_RATE // 2, SAMPLE_RATE)
    apart = [np.abs(heard[middle] - np.roll(tone, late)[middle]).max() for late in range(most)]
    assert min(apart) < 0.06, "of 0.4 at most"


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_pieces_of_any_size_are_heard_as_the_whole(format, tone):
    data = SoundEncoder(format).encode(tone[:MICRO_TURN_SAMPLES])
    whole, parts = SoundDecoder(format).decode(data), SoundDecoder(format)
    rng, at, heard = np.random.default_rng(0), 0, []
    while at < len(data):
        step = format.width * int(rng.integers(1, 400))
        heard.append(parts.decode(data[at : at + step]))
        at += step
    joined = np.concatenate(heard)
    assert abs(len(joined) - len(whole)) < 64, "a resampler keeps some to itself"
    shorter = min(len(joined), len(whole))
    np.testing.assert_allclose(joined[:shorter], whole[:shorter], atol=1e-5)


def test_bytes_that_are_no_samples_are_refused_and_cost_nothing():
    incoming = SoundDecoder(FORMATS[0])
    with pytest.raises(ValueError, match="3 bytes are no whole samples of 16 bits"):
        incoming.decode(b"abc")
    assert len(incoming.decode(b"")) == 0
    assert all(len(SoundDecoder(format).decode(b"")) == 0 for format in FORMATS)


def test_what_is_too_loud_is_cut_off():
    loud = SoundFormat("pcm", 16000).encode(np.array([2.0, -2.0, 0.5], np.float32))
    assert np.frombuffer(loud, "<i2").tolist() == [32767, -32768, 16384]
