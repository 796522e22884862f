"""Whatever the network does to its timing, sound is heard once and in order, and waits no longer than the rule says."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtml.serve.runtime.jitter_buffer import CAPACITY, JitterBuffer
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES, SAMPLE_RATE


def sound(turns: float, seed: int = 0, loudness: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (loudness * rng.standard_normal(round(turns * MICRO_TURN_SAMPLES))).astype(np.float32)


def heard(*waves: np.ndarray) -> list[np.ndarray]:
    """The bins of a wave, micro-turn by micro-turn."""
    wave, stream, found = np.concatenate(waves), DmelStream(), []
    for turn in range(len(wave) // MICRO_TURN_SAMPLES):
        stream, bins = stream.step(wave[turn * MICRO_TURN_SAMPLES : (turn + 1) * MICRO_TURN_SAMPLES])
        found.append(bins)
    return found


def silence(turns: float) -> np.ndarray:
    return np.zeros(round(turns * MICRO_TURN_SAMPLES), np.float32)


@pytest.mark.parametrize("size", [1, 320, 333, MICRO_TURN_SAMPLES, 7777])
def test_packets_of_any_size_are_heard_as_one_wave(size):
    buffer, wave = JitterBuffer(), sound(6)
    for start in range(0, len(wave), size):
        buffer.push(wave[start : start + size])
    np.testing.assert_array_equal([buffer.pop_frames() for _ in range(6)], heard(wave))
    assert (buffer.waiting_samples, buffer.missed_samples, buffer.cut_samples) == (0, 0, 0)


def test_where_nothing_came_there_is_silence_and_what_comes_late_is_heard_late():
    buffer, wave = JitterBuffer(), sound(3)
    cut = round(1.7 * MICRO_TURN_SAMPLES)
    buffer.push(wave[:cut])
    found = [buffer.pop_frames(), buffer.pop_frames(), buffer.pop_frames()]
    buffer.push(wave[cut:])
    found += [buffer.pop_frames(), buffer.pop_frames()]
    gap = 3 * MICRO_TURN_SAMPLES - cut
    np.testing.assert_array_equal(found, heard(wave[:cut], np.zeros(gap, np.float32), wave[cut:], silence(0.7)))
    assert buffer.missed_samples == gap + round(0.7 * MICRO_TURN_SAMPLES)


def test_a_reserve_that_stays_is_taken_back_from_silence_alone():
    buffer = JitterBuffer()
    buffer.push(sound(4))
    for turn in range(60):  # a client in real time, half a second late: it speaks for eight seconds, then is silent
        buffer.push(sound(1, turn) if turn < 40 else silence(1))
        buffer.pop_frames()
        if turn == 42:
            assert buffer.cut_samples == 0 and buffer.waiting_samples == 4 * MICRO_TURN_SAMPLES
    assert buffer.cut_samples == MICRO_TURN_SAMPLES
    for _ in range(60):
        buffer.push(silence(1))
        buffer.pop_frames()
    assert buffer.cut_samples == 3 * MICRO_TURN_SAMPLES and buffer.waiting_samples == MICRO_TURN_SAMPLES, (
        "as much as one micro-turn may stay"
    )


def test_a_client_whose_clock_is_fast_does_not_pile_up_latency():
    """It sends 1 % more than real time; every other second is silent."""
    buffer, piled = JitterBuffer(), []
    for turn in range(3000):
        loud = 0.1 if turn % 10 < 5 else 0.0
        buffer.push(sound(1.01, turn, loud))
        buffer.pop_frames()
        piled.append(buffer.waiting_samples)
    assert max(piled) < 3.5 * MICRO_TURN_SAMPLES
    assert (
        buffer.cut_samples == pytest.approx(0.01 * 3000 * MICRO_TURN_SAMPLES, abs=3 * MICRO_TURN_SAMPLES)
        and buffer.missed_samples == 0
    )


def test_a_client_whose_clock_is_slow_is_filled_up_with_silence():
    buffer = JitterBuffer()
    for turn in range(1000):
        buffer.push(sound(0.99, turn))
        buffer.pop_frames()
    assert buffer.missed_samples == pytest.approx(0.01 * 1000 * MICRO_TURN_SAMPLES, abs=MICRO_TURN_SAMPLES)
    assert buffer.waiting_samples < MICRO_TURN_SAMPLES


def test_an_upload_is_heard_whole_and_more_than_ten_seconds_find_no_room():
    buffer, wave = JitterBuffer(), np.concatenate([sound(20), silence(15), sound(15)])
    buffer.push(wave)
    assert buffer.free_samples() == 0 and buffer.waiting_samples == CAPACITY == 10 * SAMPLE_RATE
    with pytest.raises(ValueError, match="room for 0"):
        buffer.push(sound(1))
    found = [buffer.pop_frames() for _ in range(30)]
    np.testing.assert_array_equal(found, heard(wave)[:30])
    assert buffer.free_samples() == 30 * MICRO_TURN_SAMPLES


def test_what_is_muted_is_not_heard_and_what_is_cleared_neither():
    buffer, wave = JitterBuffer(), sound(1)
    buffer.muted = True
    buffer.push(sound(1, 1))
    buffer.muted = False
    buffer.push(sound(2, 2))
    buffer.clear()
    buffer.push(wave)
    np.testing.assert_array_equal(buffer.pop_frames(), heard(wave)[0])


def test_what_a_stall_held_back_does_not_make_a_conversation_late_for_ever():
    buffer = JitterBuffer()
    for _ in range(15):
        buffer.pop_frames()  # three seconds in which nothing comes
    for _ in range(16):
        buffer.push(np.zeros(MICRO_TURN_SAMPLES, np.float32))  # and then all of it, while nobody speaks
    for _ in range(500):
        buffer.push(np.zeros(MICRO_TURN_SAMPLES, np.float32))
        buffer.pop_frames()
    assert buffer.waiting_samples <= 2 * MICRO_TURN_SAMPLES
