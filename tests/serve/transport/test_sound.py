"""Tests of the audio formats of the protocols: audio survives the way there and back, in chunks of any size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jaxtml.serve.transport.sound import SoundDecoder, SoundEncoder, SoundFormat
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE

FORMATS = [SoundFormat("pcm", 16000), SoundFormat("pcm", 24000), SoundFormat("pcmu", 8000), SoundFormat("pcma", 8000)]
MICRO_TURNS = 10


@pytest.fixture(scope="module")
def tone() -> np.ndarray:
    """Returns two seconds of two tones, at the frequencies of a voice's pitch and of a formant."""
    t = np.arange(MICRO_TURNS * MICRO_TURN_SAMPLES) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 180 * t) + 0.1 * np.sin(2 * np.pi * 1900 * t)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_encoded_and_decoded_audio_is_the_same_a_little_later(format, tone):
    encoder, decoder = SoundEncoder(format), SoundDecoder(format)
    chunks = [encoder.encode(tone[at : at + MICRO_TURN_SAMPLES]) for at in range(0, len(tone), MICRO_TURN_SAMPLES)]
    assert {len(chunk) for chunk in chunks} == {format.rate // 5 * format.width}, "200 ms each"
    assert 0 <= encoder.delay_ms < 7
    decoded = np.concatenate([decoder.decode(chunk) for chunk in chunks])
    max_delay = SAMPLE_RATE // 10
    middle = slice(SAMPLE_RATE // 2, SAMPLE_RATE)
    errors = [np.abs(decoded[middle] - np.roll(tone, delay)[middle]).max() for delay in range(max_delay)]
    assert min(errors) < 0.06, "the peak of the tone is 0.4"


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_audio_decodes_the_same_in_chunks_of_any_size(format, tone):
    data = SoundEncoder(format).encode(tone[:MICRO_TURN_SAMPLES])
    whole, parts = SoundDecoder(format).decode(data), SoundDecoder(format)
    rng, start, chunks = np.random.default_rng(0), 0, []
    while start < len(data):
        size = format.width * int(rng.integers(1, 400))
        chunks.append(parts.decode(data[start : start + size]))
        start += size
    joined = np.concatenate(chunks)
    assert abs(len(joined) - len(whole)) < 64, "a resampler holds some samples back"
    common = min(len(joined), len(whole))
    np.testing.assert_allclose(joined[:common], whole[:common], atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4801,), (1,)])
@pytest.mark.parametrize("format", FORMATS)
def test_stream_that_is_cut_inside_samples_sounds_like_the_whole(format, sizes):
    data = format.encode(np.sin(np.arange(4000, dtype=np.float32) / 7) / 2)
    parts, chunks, rest = SoundDecoder(format), [], data
    for size in itertools.cycle(sizes):
        chunks.append(parts.decode(rest[:size]))
        rest = rest[size:]
        if not rest:
            break
    whole = SoundDecoder(format).decode(data)
    joined = np.concatenate(chunks)
    common = min(len(joined), len(whole))
    assert common > len(whole) - 64
    np.testing.assert_allclose(joined[:common], whole[:common], atol=1e-5)


def test_half_of_a_sample_waits_until_it_is_dropped():
    decoder = SoundDecoder(SoundFormat("pcm", 16_000))
    assert len(decoder.decode(b"")) == len(decoder.decode(b"\x00")) == 0
    assert decoder.decode(b"\x40").tolist() == [0.5]
    decoder.decode(b"\x00\x40\x07")
    decoder.drop_half_sample()
    assert decoder.decode(b"\x00\x40").tolist() == [0.5], "the next recording begins with a whole sample"


def test_minutes_of_sound_decode_at_once_as_they_do_in_pieces():
    noise = np.random.default_rng(0).integers(-9000, 9000, 3 * 2**17 + 5).astype("<i2").tobytes()
    whole, pieces = SoundDecoder(SoundFormat("pcm", 24000)), SoundDecoder(SoundFormat("pcm", 24000))
    expected = [pieces.decode(noise[at : at + 9600]) for at in range(0, len(noise), 9600)]
    np.testing.assert_allclose(whole.decode(noise), np.concatenate(expected), atol=1e-6)


def test_samples_beyond_full_scale_are_clipped():
    loud = SoundFormat("pcm", 16000).encode(np.array([2.0, -2.0, 0.5], np.float32))
    assert np.frombuffer(loud, "<i2").tolist() == [32767, -32768, 16384]
