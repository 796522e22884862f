"""Clock features are the same in training and in the compiled step, and exact however long a session has lasted."""

from datetime import UTC, datetime

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.stream.clock import (
    CLOCK_FEATURES,
    SESSION_PERIODS,
    WALL_PERIODS_MS,
    WEEK_MS,
    clock_features,
    week_ms,
)

MICRO_TURNS_PER_DAY = 5 * 86_400


def test_the_week_begins_on_monday_in_utc():
    monday = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
    assert week_ms(monday) == 0
    assert week_ms(monday - 0.2) == WEEK_MS - 200
    assert week_ms(monday + 2 * 86_400 + 3600.5) == 2 * 86_400_000 + 3_600_500


@pytest.mark.parametrize("first", [0, 7, MICRO_TURNS_PER_DAY, 10 * MICRO_TURNS_PER_DAY, 300 * MICRO_TURNS_PER_DAY])
def test_numpy_and_jax_give_the_same_features(first):
    micro_turn = np.arange(first, first + 64)
    week = (WEEK_MS - 6400 + 200 * np.arange(64)) % WEEK_MS
    on_host = clock_features(micro_turn, week)
    assert on_host.shape == (64, CLOCK_FEATURES) and on_host.dtype == np.float32
    in_step = clock_features(jnp.asarray(micro_turn, jnp.int32), jnp.asarray(week, jnp.int32), jnp)
    np.testing.assert_allclose(np.asarray(in_step), on_host, atol=2e-6)


def test_a_feature_repeats_after_its_period_even_after_days():
    n = len(SESSION_PERIODS) + len(WALL_PERIODS_MS)
    now = 30 * MICRO_TURNS_PER_DAY + 12_345
    here = clock_features(np.array(now), np.array(86_400_123))
    for i, period in enumerate(SESSION_PERIODS):
        later = clock_features(np.array(now + period), np.array(86_400_123))
        assert later[i] == here[i] and later[n + i] == here[n + i]
    for i, period in enumerate(WALL_PERIODS_MS, len(SESSION_PERIODS)):
        later = clock_features(np.array(now), np.array(86_400_123 + period))
        assert later[i] == here[i] and later[n + i] == here[n + i]


def test_times_past_the_end_of_the_week_are_times_of_the_next_week():
    micro_turn = np.array([5, 6])
    past_the_end = np.array([WEEK_MS, WEEK_MS + 200])
    expected = clock_features(micro_turn, past_the_end - WEEK_MS)
    np.testing.assert_array_equal(clock_features(micro_turn, past_the_end), expected)


def test_micro_turns_of_a_day_long_session_have_different_features():
    features = clock_features(np.arange(MICRO_TURNS_PER_DAY), np.zeros(MICRO_TURNS_PER_DAY, np.int64))
    assert np.abs(np.diff(features, axis=0)).max(axis=1).min() > 0.5, "neighbours look alike"
    rounded = {row.tobytes() for row in np.round(features[:: MICRO_TURNS_PER_DAY // 500], 4)}
    assert len(rounded) == len(features[:: MICRO_TURNS_PER_DAY // 500])
    assert np.abs(features).max() <= 1.0


def test_the_age_feature_grows_without_end_and_ever_slower():
    age = clock_features(10 ** np.arange(1, 8), np.zeros(7, np.int64))[:, -2]
    assert (np.diff(age) > 0.1).all() and age[-1] < 1.5
