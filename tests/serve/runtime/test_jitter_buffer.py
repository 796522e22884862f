"""Tests of the jitter buffer: audio is heard once and in order, and waits no longer than the rules allow."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.serve.runtime.jitter_buffer import CAPACITY, JitterBuffer
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE


def sound(micro_turns: float, seed: int = 0, loudness: float = 0.1) -> np.ndarray:
    """Returns noise of that many micro-turns, float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    return (loudness * rng.standard_normal(round(micro_turns * MICRO_TURN_SAMPLES))).astype(np.float32)


def heard(*waves: np.ndarray) -> list[np.ndarray]:
    """Returns the dMel frames of the joined waves, micro-turn by micro-turn."""
    wave, stream, frames = np.concatenate(waves), DmelStream(), []
    for index in range(len(wave) // MICRO_TURN_SAMPLES):
        stream, bins = stream.step(wave[index * MICRO_TURN_SAMPLES : (index + 1) * MICRO_TURN_SAMPLES])
        frames.append(bins)
    return frames


def silence(micro_turns: float) -> np.ndarray:
    """Returns silence of that many micro-turns, float32 at 16 kHz."""
    return np.zeros(round(micro_turns * MICRO_TURN_SAMPLES), np.float32)


@pytest.mark.parametrize("size", [1, 320, 333, MICRO_TURN_SAMPLES, 7777])
def test_packets_of_any_size_are_heard_as_one_wave(size):
    buffer, wave = JitterBuffer(), sound(6)
    for start in range(0, len(wave), size):
        buffer.push(wave[start : start + size])
    np.testing.assert_array_equal([buffer.pop_frames() for _ in range(6)], heard(wave))
    assert (buffer.waiting_samples, buffer.missed_samples, buffer.cut_samples) == (0, 0, 0)


def test_silence_stands_in_for_missing_audio_and_late_audio_is_heard_late():
    buffer, wave = JitterBuffer(), sound(3)
    cut = round(1.7 * MICRO_TURN_SAMPLES)
    buffer.push(wave[:cut])
    frames = [buffer.pop_frames(), buffer.pop_frames(), buffer.pop_frames()]
    buffer.push(wave[cut:])
    frames += [buffer.pop_frames(), buffer.pop_frames()]
    gap = 3 * MICRO_TURN_SAMPLES - cut
    np.testing.assert_array_equal(frames, heard(wave[:cut], np.zeros(gap, np.float32), wave[cut:], silence(0.7)))
    assert buffer.missed_samples == gap + round(0.7 * MICRO_TURN_SAMPLES)


def test_lasting_reserve_shrinks_by_removed_silence_only():
    """The reserve is the audio that is left in the buffer after each micro-turn."""
    buffer = JitterBuffer()
    buffer.push(sound(4))
    for index in range(60):  # a client in real time, 0.8 s late, that speaks for eight seconds and then is silent
        buffer.push(sound(1, index) if index < 40 else silence(1))
        buffer.pop_frames()
        if index == 42:
            assert buffer.cut_samples == 0 and buffer.waiting_samples == 4 * MICRO_TURN_SAMPLES
    assert buffer.cut_samples == MICRO_TURN_SAMPLES
    for _ in range(60):
        buffer.push(silence(1))
        buffer.pop_frames()
    assert buffer.cut_samples == 3 * MICRO_TURN_SAMPLES and buffer.waiting_samples == MICRO_TURN_SAMPLES, (
        "a reserve of one micro-turn may stay"
    )


def test_fast_client_clock_does_not_pile_up_latency():
    """The client sends 1 % more than real time, and is silent every other second."""
    buffer, waiting = JitterBuffer(), []
    for index in range(3000):
        loudness = 0.1 if index % 10 < 5 else 0.0
        buffer.push(sound(1.01, index, loudness))
        buffer.pop_frames()
        waiting.append(buffer.waiting_samples)
    assert max(waiting) < 3.5 * MICRO_TURN_SAMPLES
    assert (
        buffer.cut_samples == pytest.approx(0.01 * 3000 * MICRO_TURN_SAMPLES, abs=3 * MICRO_TURN_SAMPLES)
        and buffer.missed_samples == 0
    )


def test_slow_client_clock_is_filled_up_with_silence():
    buffer = JitterBuffer()
    for index in range(1000):
        buffer.push(sound(0.99, index))
        buffer.pop_frames()
    assert buffer.missed_samples == pytest.approx(0.01 * 1000 * MICRO_TURN_SAMPLES, abs=MICRO_TURN_SAMPLES)
    assert buffer.waiting_samples < MICRO_TURN_SAMPLES


def test_upload_is_heard_whole_and_more_than_ten_seconds_do_not_fit():
    buffer, wave = JitterBuffer(), np.concatenate([sound(20), silence(15), sound(15)])
    buffer.push(wave)
    assert buffer.free_samples() == 0 and buffer.waiting_samples == CAPACITY == 10 * SAMPLE_RATE
    with pytest.raises(ValueError, match="room for 0"):
        buffer.push(sound(1))
    frames = [buffer.pop_frames() for _ in range(30)]
    np.testing.assert_array_equal(frames, heard(wave)[:30])
    assert buffer.free_samples() == 30 * MICRO_TURN_SAMPLES


def test_upload_of_silence_is_heard_whole_whatever_its_length():
    for tenths in range(1, 101):
        buffer, micro_turns = JitterBuffer(), tenths / 2
        buffer.push(silence(micro_turns))
        for _ in range(60):
            buffer.pop_frames()
        assert buffer.cut_samples == 0, f"{tenths / 10} s"


def test_muted_audio_and_cleared_audio_are_not_heard():
    buffer, wave = JitterBuffer(), sound(1)
    buffer.muted = True
    buffer.push(sound(1, 1))
    buffer.muted = False
    buffer.push(sound(2, 2))
    buffer.clear()
    buffer.push(wave)
    np.testing.assert_array_equal(buffer.pop_frames(), heard(wave)[0])


def test_latency_of_a_network_stall_does_not_stay():
    buffer = JitterBuffer()
    for _ in range(15):
        buffer.pop_frames()  # nothing arrives for three seconds
    for _ in range(16):
        buffer.push(np.zeros(MICRO_TURN_SAMPLES, np.float32))  # then all of it arrives at once, and it is silence
    for _ in range(500):
        buffer.push(np.zeros(MICRO_TURN_SAMPLES, np.float32))
        buffer.pop_frames()
    assert buffer.waiting_samples <= 2 * MICRO_TURN_SAMPLES
