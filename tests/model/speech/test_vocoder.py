"""The vocoder as a stream: it is causal, may be cut anywhere, and keeps sessions apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import VocoderConfig
from jaxtml.model.spec import Params, count_parameters, init_params
from jaxtml.model.speech.vocoder import init_state, param_specs, vocode
from jaxtml.stream.dmel import fine_log_mel
from jaxtml.stream.timebase import FINE_HOP, FINE_PER_MICRO_TURN, SAMPLE_RATE

CFG = VocoderConfig()


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(param_specs(CFG), seed=0)


@pytest.fixture(scope="module")
def frames() -> jax.Array:
    """`[2, 80, 80]`: one second of two gliding, pulsating tones with harmonics."""
    n = np.arange(SAMPLE_RATE)
    waves = []
    for start, end in ((120, 240), (330, 200)):
        phase = 2 * np.pi * np.cumsum(np.linspace(start, end, SAMPLE_RATE)) / SAMPLE_RATE
        voice = sum(np.sin(k * phase) / k for k in range(1, 20))
        waves.append(0.1 * voice * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * n / SAMPLE_RATE)))
    return jnp.asarray(np.stack([fine_log_mel(w.astype(np.float32)) for w in waves]))


speak = jax.jit(vocode, static_argnums=0)


def test_a_stream_of_micro_turns_equals_the_whole_utterance(params, frames):
    _, complete = speak(CFG, params, init_state(CFG, 2), frames)
    state, parts = init_state(CFG, 2), []
    for start in range(0, frames.shape[1], FINE_PER_MICRO_TURN):
        state, wave = speak(CFG, params, state, frames[:, start : start + FINE_PER_MICRO_TURN])
        parts.append(wave)
    assert complete.shape == (2, frames.shape[1] * FINE_HOP)
    assert float(jnp.std(complete)) > 1e-3
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), complete, atol=1e-5, rtol=0)


def test_any_cut_gives_the_same_sound(params, frames):
    _, complete = speak(CFG, params, init_state(CFG, 2), frames)
    state, parts, start = init_state(CFG, 2), [], 0
    for length in (1, 30, 49):
        state, wave = speak(CFG, params, state, frames[:, start : start + length])
        parts.append(wave)
        start += length
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), complete, atol=1e-5, rtol=0)


def test_a_frame_changes_nothing_before_its_hop_and_something_in_it(params, frames):
    _, complete = speak(CFG, params, init_state(CFG, 2), frames)
    changed = frames.at[:, 40].add(0.5)
    _, other = speak(CFG, params, init_state(CFG, 2), changed)
    np.testing.assert_array_equal(complete[:, : 40 * FINE_HOP], other[:, : 40 * FINE_HOP])
    assert float(jnp.abs(complete - other)[:, 40 * FINE_HOP : 41 * FINE_HOP].max()) > 1e-4


def test_sessions_of_a_batch_do_not_change_each_other(params, frames):
    _, both = speak(CFG, params, init_state(CFG, 2), frames)
    for row in range(2):
        _, alone = speak(CFG, params, init_state(CFG, 1), frames[row : row + 1])
        np.testing.assert_allclose(alone[0], both[row], atol=1e-5, rtol=0)


def test_digital_silence_stays_silent(params):
    _, wave = speak(CFG, params, init_state(CFG, 1), jnp.full((1, 32, 80), -7.0))
    assert float(jnp.abs(wave).max()) < 1e-4


def test_an_hour_of_session_keeps_its_phase_finite_and_its_noise_fresh(params, frames):
    state = init_state(CFG, 2)
    state = {**state, "frame": state["frame"] + jnp.uint32(3600 * 80), "phase": state["phase"] + jnp.uint32(2**32 - 7)}
    _, late = speak(CFG, params, state, frames)
    _, early = speak(CFG, params, init_state(CFG, 2), frames)
    assert bool(jnp.all(jnp.isfinite(late)))
    np.testing.assert_allclose(jnp.std(late), jnp.std(early), rtol=0.1)
    assert float(jnp.abs(late - early).max()) > 1e-4


def test_the_vocoder_is_small_enough_to_ship():
    total, _ = count_parameters(param_specs(CFG))
    assert 1.0e6 < total < 2.0e6
